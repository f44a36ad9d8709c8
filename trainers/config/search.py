"""The ``search:`` section: which recipe keys are searched over which values, how, and by what trials are compared."""

from __future__ import annotations

import copy
import difflib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from dreamfleet.datasets.config_base import Section
from dreamfleet.datasets.path_field import path_marker
from dreamfleet.trainers.config.method import MethodConfig
from dreamfleet.trainers.config.metrics import HELD_OUT, NEEDS, is_higher_better, metrics_by_figure
from dreamfleet.trainers.config.validation import ValidationConfig

MOST_CORNERS = 256  # combinations of the keys' ends that are validated when a recipe is read
# What a trial may not differ in, and why.
YARDSTICK = "trials that are measured differently cannot be compared"
REFUSED = {
    "output_dir": "every trial has a folder of its own",
    "report_to": "it changes no result",
    "search": "a search is not searched",
    "scaling": "a trial is one process, and search.resources_per_trial says what it gets",
    "validation": YARDSTICK,
    "model": YARDSTICK + "; make a search for each model",
    "method.name": YARDSTICK + "; make a search for each method",
    "data": YARDSTICK,
}
# The parts of `data` that the measure does not depend on.
AUGMENTATIONS = (
    "random_flip",
    "shuffle_tags",
    "keep_tokens",
    "tag_dropout",
    "caption_dropout",
    "latent_sampling",
)

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


def figures_of(validation: ValidationConfig, method: MethodConfig) -> list[str]:
    """Return the figures that a validation round measures, by their names in ``metrics.jsonl``."""
    held_out = [HELD_OUT] if validation.holdout else list(method.figures)
    return held_out + validation.preview_metrics


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


def find_search_errors(
    search: SearchConfig,
    recipe: Section,
    *,
    figures: Sequence[str],
    max_train_steps: int | None,
    validate: Callable[[Mapping[str, Any]], list[str]],
) -> list[str]:
    """Return the errors of a ``search:`` section given the recipe that it is in.

    ``figures``: what a validation round of the recipe measures (:func:`figures_of`). ``validate`` returns the errors of
    a recipe given as a plain tree; it is called with values that trials may get.
    """
    mistakes = [
        *_wrong_keys(search, recipe),
        *_wrong_metric(search, figures),
        *_wrong_numbers(search, max_train_steps),
    ]
    if mistakes:
        return mistakes
    tree = recipe.model_dump(mode="json", exclude={"search"})
    for path, domain in search.space.items():
        for value in domain.probes():
            mistakes += [f"search.space.{m}" for m in validate(put_point(tree, {path: value}))]
    if mistakes:
        return list(dict.fromkeys(mistakes))
    for number, point in enumerate(search.points_to_evaluate):
        where = f"search.points_to_evaluate.{number}"
        if point.keys() != search.space.keys():
            mistakes.append(f"{where}: give one value for each of {', '.join(search.space)}")
        mistakes += [
            f"{where}: {path} {value!r} lies outside search.space"
            for path, value in point.items()
            if path in search.space and not search.space[path].contains(value)
        ]
    for point in itertools.islice(_corners(search), MOST_CORNERS):
        if wrong := validate(put_point(tree, point)):
            told = ", ".join(f"{path} {value}" for path, value in point.items())
            return [*mistakes, f"search.space: {told} do not go together: {wrong[0]}"]
    return mistakes


def _corners(search: SearchConfig) -> Iterator[Point]:
    for values in itertools.product(*(domain.probes() for domain in search.space.values())):
        yield dict(zip(search.space, values, strict=True))


class _Key(NamedTuple):
    """A key of the recipe, such as ``train.seed``, and why it cannot be searched (None: it can)."""

    name: str
    refusal: str | None


def _wrong_keys(search: SearchConfig, recipe: Section) -> Iterator[str]:
    known = _keys(recipe)
    searchable = [name for name, key in known.items() if name == key.name and not key.refusal]
    for path, domain in search.space.items():
        where = f"search.space.{path}"
        if path not in known:
            near = difflib.get_close_matches(path, searchable, n=1, cutoff=0.5)
            yield f"{where}: no key of this recipe" + (f"; did you mean {near[0]!r}?" if near else "")
        elif known[path].name != path:
            yield f"{where}: write it as {known[path].name!r} here"
        elif reason := known[path].refusal:
            yield f"{where}: cannot be searched: {reason}"
        elif search.algorithm == "grid" and domain.values is None and domain.num is None:
            yield f"{where}: a grid needs num, the number of values between lower and upper"


def _keys(section: Section, prefix: str = "") -> dict[str, _Key]:
    """Return the keys of a recipe by all their names, the aliases of other projects included."""
    found: dict[str, _Key] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section) and name != "search":
            found |= _keys(value, f"{prefix}{name}.")
            continue
        refusal = REFUSED.get(prefix + name) or REFUSED.get((prefix or name).rstrip("."))
        if prefix == "data." and name in AUGMENTATIONS:
            refusal = None
        elif isinstance(section, MethodConfig):
            marker = path_marker(field)
            is_file = marker is not None and marker.kind == "file" and not marker.is_start
            refusal = (
                refusal or section.not_searched.get(name) or ("files are not searched" if is_file else None)
            )
        for alias in [name, *getattr(field.validation_alias, "choices", [])]:
            found[f"{prefix}{alias}"] = _Key(prefix + name, refusal)
    return found


def _wrong_metric(search: SearchConfig, measured: Sequence[str]) -> Iterator[str]:
    if search.metric in measured:
        return
    known = metrics_by_figure()
    if search.metric == HELD_OUT:
        way = f"give {NEEDS['holdout']}"
    elif search.metric in known:
        way = f"name it in validation.metrics, and give validation.prompts for the previews it scores ({search.metric})"
    else:
        near = difflib.get_close_matches(search.metric, known, n=1, cutoff=0.5)
        way = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    now = f"measures {', '.join(measured)}" if measured else "measures nothing"
    yield f"search.metric: validation {now}, not {search.metric!r}; {way}"


def _wrong_numbers(search: SearchConfig, steps: int | None) -> Iterator[str]:
    if search.num_trials is None and search.algorithm != "grid":
        yield "search.num_trials: missing; say how many trials (only a grid has a number of its own)"
    if steps and search.grace_period and search.grace_period > steps:
        yield f"search.grace_period: {search.grace_period} is more than train.max_train_steps {steps}"
    for name, amount in (search.resources_per_trial or {}).items():
        if amount < 0 or (name == "GPU" and amount > 1 and amount % 1):
            yield f"search.resources_per_trial.{name}: {amount:g}; give 0 to 1, or a whole number"
