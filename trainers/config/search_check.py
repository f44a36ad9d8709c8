"""Checks a ``search:`` section against the rest of its recipe."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dreamfleet.datasets.config_base import Section
from dreamfleet.datasets.path_field import path_marker
from dreamfleet.trainers.config.method import MethodConfig
from dreamfleet.trainers.config.metrics import HELD_OUT, METRICS, NEEDS, metric_of, metrics_by_figure
from dreamfleet.trainers.config.optimizer import OptimizerConfig
from dreamfleet.trainers.config.search import Point, SearchConfig, put_point

MAX_CORNERS = 256  # maximum number of combinations of domain ends that are validated when a recipe is read
# Keys that must be equal in all trials -> the reason.
NOT_COMPARABLE = "trials that are measured differently cannot be compared"
REFUSED = {
    "output_dir": "every trial has a folder of its own",
    "report_to": "it changes no result",
    "tracking": "it changes no result",
    "search": "a search is not searched",
    "storage": "it changes no result",
    "scaling": "all trials have search.workers_per_trial processes with search.resources_per_trial",
    "validation": NOT_COMPARABLE,
    "model": NOT_COMPARABLE + "; start a search for each model",
    "method.name": NOT_COMPARABLE + "; start a search for each method",
    "data": NOT_COMPARABLE,
}
# Keys of `data:` that do not affect what is measured.
AUGMENTATIONS = (
    "random_flip",
    "shuffle_tags",
    "keep_tokens",
    "tag_dropout",
    "caption_dropout",
    "latent_sampling",
)


def find_search_errors(
    search: SearchConfig,
    recipe: Section,
    *,
    figures: Sequence[str],
    max_train_steps: int | None,
    use_gpu: bool | str,
    validate: Callable[[Mapping[str, Any]], list[str]],
) -> list[str]:
    """Return the errors of a ``search:`` section, given its recipe.

    ``figures``: the keys that a validation round of the recipe measures. ``use_gpu``: the key of ``scaling``.
    ``validate`` returns the errors of a recipe given as a plain tree; it is called with recipes that trials could have.
    """
    if not search.space:
        return [
            "search.space: missing; this method has no default space, so list the searched keys and their values"
        ]
    wrong_keys = dict(_wrong_keys(search, recipe))
    errors = [
        *wrong_keys.values(),
        *_wrong_metrics(search, figures),
        *_wrong_limits(search, use_gpu),
        *_wrong_numbers(search, max_train_steps),
        *_wrong_points(search),
    ]
    tree = recipe.model_dump(mode="json", exclude={"search"})
    known = set(validate(tree))  # errors of the recipe itself, which every trial has
    wrong_values = [
        f"search.space.{error}"
        for path, domain in search.space.items()
        if path not in wrong_keys
        for value in domain.probes()
        for error in validate(put_point(tree, {path: value}))
        if error not in known
    ]
    if not wrong_keys and not wrong_values:
        errors += _wrong_corners(
            search, lambda point: [error for error in validate(put_point(tree, point)) if error not in known]
        )
    return list(dict.fromkeys([*errors, *wrong_values]))


def _wrong_corners(search: SearchConfig, validate: Callable[[Point], list[str]]) -> Iterator[str]:
    """Yield the first combination of values with each error."""
    seen = set()
    for point in itertools.islice(_corners(search), MAX_CORNERS):
        for error in validate(point):
            if error not in seen:
                seen.add(error)
                values = ", ".join(f"{path} {value}" for path, value in point.items())
                yield f"search.space: {values} cannot be combined: {error}"


def _corners(search: SearchConfig) -> Iterator[Point]:
    for values in itertools.product(*(domain.probes() for domain in search.space.values())):
        yield dict(zip(search.space, values, strict=True))


class _Key(NamedTuple):
    """A key of the recipe, such as ``train.seed``, and the reason why it cannot be searched (None if it can)."""

    name: str
    refusal: str | None


def _wrong_keys(search: SearchConfig, recipe: Section) -> Iterator[tuple[str, str]]:
    """Yield the keys that cannot be searched, and the error of each."""
    known = _keys(recipe)
    searchable = [name for name, key in known.items() if name == key.name and not key.refusal]
    for path, domain in search.space.items():
        where = f"search.space.{path}"
        if path not in known:
            near = difflib.get_close_matches(path, searchable, n=1, cutoff=0.5)
            yield path, f"{where}: no key of this recipe" + (f"; did you mean {near[0]!r}?" if near else "")
        elif known[path].name != path:
            yield path, f"{where}: write it as {known[path].name!r} here"
        elif reason := known[path].refusal:
            yield path, f"{where}: cannot be searched: {reason}"
        elif search.algorithm == "grid" and domain.values is None and domain.num is None:
            yield path, f"{where}: a grid needs num, the number of values between lower and upper"


def _keys(section: Section, prefix: str = "") -> dict[str, _Key]:
    """Return the keys of a recipe by all their names, including the aliases from other projects."""
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
        if isinstance(section, OptimizerConfig) and name == "options":
            own = section.kind.Options.model_fields
            found |= {f"{prefix}options.{key}": _Key(f"{prefix}options.{key}", None) for key in own}
            refusal = "search its keys: " + ", ".join(f"{prefix}options.{key}" for key in own)
        for alias in [name, *getattr(field.validation_alias, "choices", [])]:
            found[f"{prefix}{alias}"] = _Key(prefix + name, refusal)
    return found


def _wrong_metrics(search: SearchConfig, measured: Sequence[str]) -> Iterator[str]:
    known = metrics_by_figure()
    now = f"measures {', '.join(measured)}" if measured else "measures nothing"
    for metric in dict.fromkeys(search.metrics):
        if metric in measured:
            continue
        if metric == HELD_OUT:
            way = f"set {NEEDS['holdout']}; or compare trials by view_loss, which needs none"
        elif name := metric_of(metric):
            way = f"add {name} to validation.metrics"
            if METRICS.get(name).compute is not None:
                way += ", and set validation.prompts for the previews that it scores"
        else:
            near = difflib.get_close_matches(metric, known, n=1, cutoff=0.5)
            way = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        yield f"search.metric: validation {now}, not {metric!r}; {way}"
    if len(set(search.metrics)) < len(search.metrics):
        yield f"search.metric: {search.metrics} contains one of them twice"
    if isinstance(search.mode, list) and len(search.mode) != len(search.metrics):
        yield f"search.mode: {len(search.mode)} values for {len(search.metrics)} metrics; give one for each"
    elif isinstance(search.mode, str) and len(search.metrics) > 1:
        yield f"search.mode: {search.mode} for {len(search.metrics)} metrics; give a list with one for each, or none"


def _wrong_limits(search: SearchConfig, use_gpu: bool | str) -> Iterator[str]:
    limits = ("num_trials", "patience", "max_hours", "max_gpu_hours")
    is_endless = search.algorithm != "grid" and search.size is None
    if is_endless and all(getattr(search, name) is None for name in limits):
        yield (
            f"search.num_trials: missing; set the number of trials, or {', '.join(limits[1:])} (only a grid and a "
            "space of finitely many points end by themselves)"
        )
    if search.max_gpu_hours is not None and use_gpu is False:
        yield "search.max_gpu_hours: no trial uses a GPU with scaling.use_gpu: false; use max_hours"


def _wrong_points(search: SearchConfig) -> Iterator[str]:
    for number, point in enumerate(search.points_to_evaluate):
        where = f"search.points_to_evaluate.{number}"
        if point.keys() != search.space.keys():
            yield f"{where}: give one value for each of {', '.join(search.space)}"
        for path, value in point.items():
            if path in search.space and not search.space[path].contains(value):
                yield f"{where}: {path} {value!r} is outside search.space"


def _wrong_numbers(search: SearchConfig, steps: int | None) -> Iterator[str]:
    if steps and search.grace_period and search.grace_period > steps:
        yield f"search.grace_period: {search.grace_period} is more than train.max_train_steps {steps}"
    for name, amount in (search.resources_per_trial or {}).items():
        if amount < 0 or (name == "GPU" and amount > 1 and amount % 1):
            yield f"search.resources_per_trial.{name}: {amount:g}; give 0 to 1, or a whole number"
