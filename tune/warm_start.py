"""Reads the trials of earlier searches, from which the sampler of a new search learns (``search.warm_start``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from dreamfleet.datasets.errors import RecipeError, UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.differences import differences
from dreamfleet.trainers.config.search import put_point
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.tune.search_state import EarlierTrial
from dreamfleet.tune.space import canonical
from dreamfleet.tune.trial_store import FILE, RECIPE, TrialStore, read_store

MAX_LISTED = 8  # keys that a line names
# Keys that do not change what a trial measures.
IRRELEVANT = ("search", "scaling", "storage", "output_dir", "report_to", "tracking")


def read_earlier(store: TrialStore) -> list[EarlierTrial]:
    """Return the finished trials of the searches in ``search.warm_start``, completed or stopped, in their order.

    Trials outside the space are left out. Raises RecipeError that lists every folder that cannot be used: without a
    search, of another method, with other searched keys, or without one of the metrics.
    """
    earlier: list[EarlierTrial] = []
    errors: list[str] = []
    for folder in store.search.warm_start:
        try:
            earlier += _read(store, folder)
        except RecipeError as error:
            errors.append(f"search.warm_start: {folder} {error}")
    if errors:
        raise RecipeError("\n  ".join(errors))
    return earlier


def describe_earlier(store: TrialStore) -> Iterator[str]:
    """Yield a line for each search of ``search.warm_start``: its trials that are used, and the keys that differ.

    The keys are left out for a search that was deleted since.
    """
    for folder in store.search.warm_start:
        used = [trial for trial in store.state.earlier if trial.search == folder]
        try:
            keys = differences(_comparable(_read_recipe(folder)), _comparable(store.recipe))
        except UserError:
            keys = []
        more = f" and {len(keys) - MAX_LISTED} more" if len(keys) > MAX_LISTED else ""
        differ = f"; other than in this search: {', '.join(keys[:MAX_LISTED])}{more}" if keys else ""
        yield f"warm start: {len(used)} trials of {folder}{differ}"


def _read(store: TrialStore, folder: str) -> list[EarlierTrial]:
    """Read one earlier search. Raises RecipeError with the end of a sentence that starts with its folder."""
    search, before = store.search, _read_recipe(folder)
    assert before.search is not None
    if before.method.name != store.recipe.method.name:
        raise RecipeError(f"is a search of {before.method.name}, not of {store.recipe.method.name}")
    wrong = []
    if other := sorted(before.search.space.keys() ^ search.space.keys()):
        wrong.append(f"searched other keys than this one (only one of both has {', '.join(other)})")
    if missing := [metric for metric in search.metrics if metric not in before.figures]:
        wrong.append(f"did not measure {', '.join(missing)}")
    if wrong:
        raise RecipeError(" and ".join(wrong))
    # A new store, in which its trials count by their best rounds of this search's first metric.
    trials = TrialStore(store.recipe, read_store(before).trials).trials
    found = []
    for trial in trials:
        figures = {metric: value for metric in search.metrics if (value := trial.figure(metric)) is not None}
        is_inside = all(domain.contains(trial.point[path]) for path, domain in search.space.items())
        if trial.status in ("completed", "stopped") and is_inside and len(figures) == len(search.metrics):
            found.append(EarlierTrial(folder, trial.name, canonical(search, trial.point), figures))
    return found


def _read_recipe(folder: str) -> Recipe:
    storage = Storage(folder)
    if not storage.exists(FILE) or not storage.exists(RECIPE):
        raise RecipeError(f"holds no search ({FILE} and {RECIPE}); give the output_dir of a search")
    try:
        recipe = build_recipe(yaml.safe_load(storage.read_text(RECIPE)), source=RECIPE)
    except RecipeError as error:
        raise RecipeError(f"cannot be read: {error}") from error
    return recipe.model_copy(update={"output_dir": folder})


def _comparable(recipe: Recipe) -> dict[str, Any]:
    tree = recipe.model_dump(mode="json", exclude=set(IRRELEVANT))
    assert recipe.search is not None
    return put_point(tree, dict.fromkeys(recipe.search.space))
