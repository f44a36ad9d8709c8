"""The ``search:`` section: which recipe keys are searched over which values, how, and by what trials are compared."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from dreamfleet.datasets.config_base import Section
from dreamfleet.trainers.config.metrics import HELD_OUT, is_higher_better

Value = bool | int | float | str | None
Point = dict[str, Value]  # one value for each searched key, by its dotted name


def _read_number(value: Any) -> Any:
    # YAML 1.1 reads 1e-4 as text (it wants 1.0e-4).
    number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value.strip())
    return float(value) if number else value


class Domain(Section):
    """The values of one searched key."""

    distribution: Literal["uniform", "loguniform", "randint", "lograndint", "choice"] = Field(
        description="Ray Tune's names; `randint` and `lograndint` draw whole numbers"
    )
    lower: float | None = Field(None, description="smallest value of a range")
    upper: float | None = Field(None, description="largest value of a range, itself included")
    values: list[Annotated[Value, BeforeValidator(_read_number)]] | None = Field(
        None, description="the values of `choice`"
    )
    num: int | None = Field(None, ge=2, description="with `algorithm: grid`: so many values of a range")

    @model_validator(mode="after")
    def _check(self) -> Domain:
        if self.distribution == "choice":
            if not self.values or (self.lower, self.upper, self.num) != (None, None, None):
                raise ValueError("choice takes values: [...] and nothing else")
            if len(set(map(repr, self.values))) < len(self.values):
                raise ValueError(f"values {self.values} holds one of them twice")
            return self
        if self.lower is None or self.upper is None or self.values is not None:
            raise ValueError(f"{self.distribution} takes lower and upper (values are for choice)")
        if self.upper <= self.lower:
            raise ValueError(f"upper {self.upper:g} must be over lower {self.lower:g}")
        if self.log and self.lower <= 0:
            raise ValueError(f"{self.distribution} needs a lower over 0 (got {self.lower:g})")
        if self.whole and (self.lower % 1 or self.upper % 1):
            raise ValueError(f"{self.distribution} goes from one whole number to another")
        return self

    @property
    def log(self) -> bool:
        """Whether values are spread evenly over their logarithm."""
        return self.distribution in ("loguniform", "lograndint")

    @property
    def whole(self) -> bool:
        """Whether values are drawn from the whole numbers of a range."""
        return self.distribution in ("randint", "lograndint")

    def range(self) -> tuple[float, float]:
        """Return the ends of a range."""
        assert self.lower is not None and self.upper is not None
        return self.lower, self.upper

    def contains(self, value: Value) -> bool:
        """Say whether a search over this domain may come to the value."""
        if self.values is not None:
            return any(value == own and type(value) is type(own) for own in self.values)
        lower, upper = self.range()
        if isinstance(value, bool) or not isinstance(value, int | float) or not lower <= value <= upper:
            return False
        return not self.whole or value % 1 == 0

    def probes(self) -> list[Value]:
        """List the values whose validity stands for all: every choice, or the ends of a range and one inside."""
        if self.values is not None:
            return list(self.values)
        lower, upper = self.range()
        if self.whole:
            return [int(lower), int(upper)]
        return [lower, upper, lower + 0.38 * (upper - lower)]  # not whole: a key of whole numbers refuses it


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


class SearchConfig(Section):
    """The ``search:`` section: what `dreamfleet tune` tries, and how it decides."""

    space: Annotated[dict[str, Domain], BeforeValidator(_flatten)] = Field(
        min_length=1, description="searched keys by their dotted name, such as `optimizer.learning_rate`"
    )
    num_trials: int | None = Field(None, ge=1, description="how many trials; unset with `grid`: every point")
    algorithm: Literal["optuna", "random", "grid"] = Field(
        "optuna", description="`optuna`: its TPE sampler, which learns from the trials so far"
    )
    metric: str = Field(
        HELD_OUT,
        description="figure that trials are compared by: `holdout_loss`, or one of `validation.metrics`",
    )
    mode: Literal["min", "max"] | None = Field(
        None, description="unset: `min` for the loss, `max` for scores"
    )
    scheduler: Literal["asha", "none"] = Field(
        "asha", description="`asha` stops trials that lag behind, at validation rounds"
    )
    grace_period: int | None = Field(
        None, ge=1, description="optimizer steps before `asha` stops a trial; unset: one validation round"
    )
    reduction_factor: float = Field(
        4, gt=1, description="`asha` lets the best 1 of so many go on at each rung"
    )
    max_concurrent_trials: int | None = Field(None, ge=1, description="unset: as many as the machines hold")
    resources_per_trial: dict[str, float] | None = Field(
        None,
        description="Ray resources of a trial, e.g. `{CPU: 1, GPU: 0.5}`, half a card and its memory; "
        "unset: a GPU, else a share of the CPUs",
    )
    points_to_evaluate: list[dict[str, Annotated[Value, BeforeValidator(_read_number)]]] = Field(
        [], description="points that are tried first, one value for every key of `space`"
    )
    seed: int = Field(0, ge=0, description="of the points; the trials themselves share `train.seed`")

    @property
    def maximise(self) -> bool:
        """Whether more of the metric is better."""
        return self.mode == "max" if self.mode else is_higher_better(self.metric)


def put_point(tree: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """Return a copy of a recipe's plain tree with the point's values in it."""
    changed = copy.deepcopy(dict(tree))
    for path, value in point.items():
        *parents, last = path.split(".")
        node = changed
        for part in parents:
            node = node[part]
        node[last] = value
    return changed
