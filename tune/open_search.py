"""Opens the folder of a search: a new one, or with ``--resume`` an existing one if it holds the same search."""

from __future__ import annotations

import yaml

from dreamfleet.datasets.errors import CheckpointError, DataError, RecipeError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.differences import describe_differences
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.trainers.run.run_folder import is_resumed
from dreamfleet.tune.trial_store import FILE, RECIPE, TrialStore, read_store
from dreamfleet.tune.warm_start import read_earlier

# Keys of `search` that may change when a search is resumed: they determine how trials are run, not what they train.
CHANGEABLE = (
    "num_trials",
    "patience",
    "max_hours",
    "max_gpu_hours",
    "keep_best",
    "max_concurrent_trials",
    "resources_per_trial",
    "workers_per_trial",
    "scheduler",
    "grace_period",
    "reduction_factor",
)


def open_store(recipe: Recipe, *, resume: bool) -> TrialStore:
    """Return the trial store of the search in ``output_dir``: a new one, or with ``resume`` the existing one.

    Raises RecipeError if the folder is in use and not resumed, or if ``search.warm_start`` names a search that cannot
    be used; CheckpointError if it holds a different search.
    """
    if is_resumed(recipe, FILE, what="search", resume=resume):
        _refuse_another_search(Storage(recipe.output_dir), recipe)
        return read_store(recipe)
    store = TrialStore(recipe)
    store.state.earlier = read_earlier(store)
    return store


def open_folder(folder: str) -> TrialStore:
    """Return the trials of the search in a folder, which may have been moved, for reading.

    Raises DataError if the folder holds no search, CheckpointError if its recipe is not valid any more.
    """
    storage = Storage(folder)
    if not (storage.exists(FILE) and storage.exists(RECIPE)):
        raise DataError(
            f"{folder} holds no search; name the output_dir of `dreamfleet tune`, with its {FILE}"
        )
    recipe = _read_recipe(storage).model_copy(update={"output_dir": storage.path()})
    return read_store(recipe, clock=lambda: 0.0)


def _refuse_another_search(folder: Storage, recipe: Recipe) -> None:
    before = _read_recipe(folder).model_dump(mode="json")
    now = recipe.model_dump(mode="json")
    for tree in (before, now):
        for name in CHANGEABLE:
            tree["search"].pop(name, None)
        for name in ("scaling", "storage", "output_dir", "report_to", "tracking"):
            tree.pop(name, None)
    if changed := describe_differences(before, now):
        raise CheckpointError(
            f"output_dir {recipe.output_dir} holds a different search ({', '.join(changed[:5])}). "
            f"Only search.{', search.'.join(CHANGEABLE)} and scaling may change; otherwise give another output_dir"
        )


def _read_recipe(folder: Storage) -> Recipe:
    try:
        return build_recipe(yaml.safe_load(folder.read_text(RECIPE)), source=folder.path(RECIPE))
    except RecipeError as error:
        raise CheckpointError(f"the search cannot be opened: {error}") from error
