"""The ``search:`` section: the searched keys and their values, the algorithm, and the metric that compares trials."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from dreamfleet.datasets.config_base import Section
from dreamfleet.datasets.path_field import PathField
from dreamfleet.trainers.config.metrics import HELD_OUT, is_higher_better

Value = bool | int | float | str | None
Point = dict[str, Value]  # searched key, such as optimizer.learning_rate -> value


def _read_number(value: Any) -> Any:
    # YAML 1.1 reads 1e-4 as text (only 1.0e-4 is a number).
    number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value.strip())
    return float(value) if number else value


class Domain(Section):
    """The values of one searched key."""

    distribution: Literal["uniform", "loguniform", "randint", "lograndint", "choice"] = Field(
        description="names as in Ray Tune; `randint` and `lograndint` draw whole numbers"
    )
    lower: float | None = Field(None, description="smallest value of a range")
    upper: float | None = Field(None, description="largest value of a range, inclusive")
    values: list[Annotated[Value, BeforeValidator(_read_number)]] | None = Field(
        None, description="the values of `choice`"
    )
    num: int | None = Field(None, ge=2, description="with `algorithm: grid`: number of values of a range")

    @model_validator(mode="after")
    def _check(self) -> Domain:
        if self.distribution == "choice":
            if not self.values or (self.lower, self.upper, self.num) != (None, None, None):
                raise ValueError("choice takes values: [...] and nothing else")
            if len(set(map(repr, self.values))) < len(self.values):
                raise ValueError(f"values {self.values} contains one of them twice")
            return self
        if self.lower is None or self.upper is None or self.values is not None:
            raise ValueError(f"{self.distribution} takes lower and upper (values are for choice)")
        if self.upper <= self.lower:
            raise ValueError(f"upper {self.upper:g} must be above lower {self.lower:g}")
        if self.log and self.lower <= 0:
            raise ValueError(f"{self.distribution} needs a lower above 0 (got {self.lower:g})")
        if self.whole and (self.lower % 1 or self.upper % 1):
            raise ValueError(f"{self.distribution} needs whole numbers as lower and upper")
        return self

    @property
    def log(self) -> bool:
        """Whether the logarithm of the values is distributed evenly."""
        return self.distribution in ("loguniform", "lograndint")

    @property
    def whole(self) -> bool:
        """Whether values are whole numbers."""
        return self.distribution in ("randint", "lograndint")

    def range(self) -> tuple[float, float]:
        """Return the lower and upper end of a range."""
        assert self.lower is not None and self.upper is not None
        return self.lower, self.upper

    def contains(self, value: Value) -> bool:
        """Return whether a search over this domain can reach the value."""
        if self.values is not None:
            return any(value == own and type(value) is type(own) for own in self.values)
        lower, upper = self.range()
        if isinstance(value, bool) or not isinstance(value, int | float) or not lower <= value <= upper:
            return False
        return not self.whole or value % 1 == 0

    @property
    def size(self) -> int | None:
        """The number of values; None for a range of real numbers."""
        if self.values is not None:
            return len(self.values)
        lower, upper = self.range()
        return int(upper - lower) + 1 if self.whole else None

    def probes(self) -> list[Value]:
        """Return values that are validated in place of all: every choice, or the ends of a range and a value inside."""
        if self.values is not None:
            return list(self.values)
        lower, upper = self.range()
        if self.whole:
            return [int(lower), int(upper)]
        return [
            lower,
            upper,
            lower + 0.38 * (upper - lower),
        ]  # not a whole number, so that a key for whole numbers rejects it


def _flatten(space: Any) -> Any:
    # {optimizer: {learning_rate: {...}}} is the same as {optimizer.learning_rate: {...}}.
    if not isinstance(space, Mapping):
        return space
    flat: dict[str, Any] = {}
    for key, value in space.items():
        if isinstance(value, Mapping) and value and all(isinstance(v, Mapping) for v in value.values()):
            flat |= {f"{key}.{inner}": domain for inner, domain in _flatten(value).items()}
        else:
            flat[str(key)] = value
    return flat


Mode = Literal["min", "max"]
# Only the driver reads it, and it is checked when the search starts.
EARLIER_SEARCH = PathField("folder", must_exist=False, compared=False, per_machine=True)


class SearchConfig(Section):
    """The ``search:`` section: the search space, algorithm and limits of `dreamfleet tune`."""

    space: Annotated[dict[str, Domain], BeforeValidator(_flatten)] = Field(
        default_factory=dict,
        min_length=1,
        validate_default=False,
        description="searched keys, such as `optimizer.learning_rate`, and their values; default: "
        "[the method's](#default-spaces)",
    )
    num_trials: int | None = Field(
        None,
        ge=1,
        description="number of trials; may be left out with `grid`, with a finite space, or with another limit",
    )
    patience: int | None = Field(
        None, ge=1, description="end after this many trials in a row that improved nothing"
    )
    max_hours: float | None = Field(
        None,
        gt=0,
        description="end after this many hours, all sessions together; running trials save a checkpoint and stop",
    )
    max_gpu_hours: float | None = Field(
        None,
        gt=0,
        description="end after this many hours of GPU time of all trials; running ones stop as well",
    )
    algorithm: Literal["optuna", "random", "grid"] = Field(
        "optuna", description="`optuna`: its TPE sampler, which uses the results of earlier trials"
    )
    metric: str | Annotated[list[str], Field(min_length=1)] = Field(
        HELD_OUT,
        description="figure by which trials are compared: `holdout_loss`, or one of `validation.metrics`; several "
        "give a Pareto front, and the first of them ranks the trials",
    )
    mode: Mode | list[Mode] | None = Field(
        None,
        description="default: `min` for the loss, `max` for scores; of several metrics a list in their order",
    )
    scheduler: Literal["asha", "none"] = Field(
        "asha", description="`asha` stops trials with poor results (of the first metric) at validation rounds"
    )
    grace_period: int | None = Field(
        None,
        ge=1,
        description="optimizer steps before `asha` may stop a trial; default: a third of the steps, and at least one "
        "validation round",
    )
    reduction_factor: float = Field(
        4, gt=1, description="`asha` continues the best 1 of this many trials at each rung"
    )
    keep_best: int = Field(
        1,
        ge=1,
        description="number of best trials whose weights are kept and exported at the end, with several metrics also "
        "the Pareto front; the others keep only their figures and previews",
    )
    warm_start: list[Annotated[str, EARLIER_SEARCH]] = Field(
        [],
        description="folders of earlier searches over the same keys, whose results the sampler also uses",
    )
    max_concurrent_trials: int | None = Field(
        None,
        ge=1,
        description="default: as many as fit on the cluster; with `optuna`, no more than a quarter of the trials share "
        "processes, since it proposes points from the results of earlier ones",
    )
    workers_per_trial: int | None = Field(
        None,
        ge=1,
        description="training processes of a trial, which with more than one run through Ray Train; default: "
        "`scaling.num_workers`. With 1, trials of small methods share processes (`scaling.slots_per_worker`)",
    )
    resources_per_trial: dict[str, float] | None = Field(
        None,
        description="Ray resources of a trial, such as `{CPU: 1, GPU: 0.5}` for half a GPU and half its memory; "
        "default: a GPU, or a share of the CPUs",
    )
    points_to_evaluate: list[dict[str, Annotated[Value, BeforeValidator(_read_number)]]] = Field(
        [], description="points that are tried first, with a value for every key of `space`"
    )
    seed: int = Field(
        0, ge=0, description="seed of the sampled points; the trials themselves share `train.seed`"
    )

    @property
    def metrics(self) -> list[str]:
        """The figures by which trials are compared."""
        return [self.metric] if isinstance(self.metric, str) else list(self.metric)

    @property
    def objective(self) -> str:
        """The first metric, which ranks the trials and by which the scheduler stops them."""
        return self.metrics[0]

    @property
    def maximise(self) -> bool:
        """Whether higher values of the objective are better."""
        return self.maximises(self.objective)

    @property
    def size(self) -> int | None:
        """The number of points of the space; None if a key has a range of real numbers."""
        sizes = [domain.size for domain in self.space.values()]
        return None if None in sizes else math.prod(size for size in sizes if size)

    def maximises(self, metric: str) -> bool:
        """Return whether higher values of one of the metrics are better."""
        if isinstance(self.mode, list):
            return self.mode[self.metrics.index(metric)] == "max"
        return self.mode == "max" if self.mode else is_higher_better(metric)

    def with_default_space(self, space: Mapping[str, Mapping[str, Any]]) -> SearchConfig:
        """Return the section with the space, as plain data, if it has none of its own."""
        if self.space:
            return self
        return self.model_copy(update={"space": {path: Domain(**fields) for path, fields in space.items()}})


def put_point(tree: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """Return a copy of a recipe, given as a plain tree, with the values of a point."""
    changed = copy.deepcopy(dict(tree))
    for path, value in point.items():
        *parents, last = path.split(".")
        node = changed
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return changed
