"""Says, before a search starts, which searched values keep its trials from sharing a process."""

from __future__ import annotations

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.config.packing import find_unpackable, pack_key
from dreamfleet.trainers.config.search import Value
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.tune.trial_store import trial_recipe


def describe_unpacked(recipe: Recipe) -> list[str]:
    """Return a line for each searched key with values whose trials run unpacked; none if no trial can be packed."""
    search = recipe.search
    if search is None or recipe.scaling.slots_per_worker == 1 or search.max_concurrent_trials == 1:
        return []
    if find_unpackable(trial_recipe(recipe, {}, recipe.output_dir)):
        return []  # the pool says why
    lines = []
    for path, domain in search.space.items():
        trials = [trial for value in domain.probes() if (trial := _trial(recipe, path, value))]
        reasons = dict.fromkeys(filter(None, map(find_unpackable, trials)))
        if reasons:
            lines.append(f"trials that run alone in their process: {'; '.join(reasons)}")
        elif len({pack_key(trial) for trial in trials}) > 1:
            lines.append(
                f"trials with different {path} are not packed together: they share no passes of a model"
            )
    return lines


def _trial(recipe: Recipe, path: str, value: Value) -> Recipe | None:
    """Return the recipe of a trial with one value; None if it needs the values of other keys."""
    try:
        return trial_recipe(recipe, {path: value}, recipe.output_dir)
    except RecipeError:
        return None
