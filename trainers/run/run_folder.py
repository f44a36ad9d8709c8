"""Opens, checks and owns run folders; defines the names of their metrics, log, stop and marker files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import yaml

from dreamfleet.datasets.errors import CheckpointError, RecipeError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.differences import describe_differences
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.report.events import FOLDER as EVENTS
from dreamfleet.trainers.run.claim import describe_holder
from dreamfleet.trainers.run.fence import Fence, Owner
from dreamfleet.trainers.run.lease import LEASE_FILE
from dreamfleet.trainers.run.ownership import Ownership, hold

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
LOG_FILE = "run.log"
STOP_FILE = "STOP"  # written by the driver or by a user: the run then saves a checkpoint and ends
MARKER_PREFIX = ".seen-"  # of files that test whether machines share a folder
# Files and folders that may remain after a start that failed before training
LEFTOVERS = (LOG_FILE, STOP_FILE, EVENTS, "hangs", LEASE_FILE)
# Sections of a recipe that may differ between two starts of one run: they determine where it runs, not what it trains
CHANGEABLE = ("engine", "scaling", "storage", "output_dir", "report_to")


def is_used(folder: Storage) -> bool:
    """Return whether a folder holds more than log, stop file, markers and empty folders of a failed start."""
    if any(name not in LEFTOVERS and not name.startswith(MARKER_PREFIX) for name in folder.list()):
        return True
    return any(folder.has_files(name) for name in folder.list_dirs() if name not in LEFTOVERS)


def is_resumed(recipe: Recipe, marker: str, *, what: str, resume: bool, continues: bool = False) -> bool:
    """Return whether ``output_dir`` holds a run, search or fleet (``what``) to continue; False if it is unused.

    ``marker`` is a file that every such folder has: its recipe. Raises RecipeError if the folder holds other files, or
    holds one and neither ``resume`` nor ``continues``, or one with other settings and ``continues``.
    """
    folder = Storage(recipe.output_dir)
    if not folder.exists(marker):
        if is_used(folder):
            raise RecipeError(
                f"output_dir {recipe.output_dir} is not empty and holds no {what}; use another output_dir"
            )
        return False
    if not (resume or continues):
        holder = describe_holder(folder)
        in_use = f" (in use by {holder})" if holder else ""
        raise RecipeError(
            f"output_dir {recipe.output_dir} holds a {what} already{in_use}; continue it with --resume, or use another "
            "output_dir"
        )
    if continues and not resume:
        _require_equal(recipe, folder, marker, what=what)
    return True


def _require_equal(recipe: Recipe, folder: Storage, marker: str, *, what: str) -> None:
    """Raise RecipeError if the folder's recipe has other settings, with the difference key by key."""
    before, now = yaml.safe_load(folder.read_text(marker)), yaml.safe_load(recipe.to_yaml())
    for tree in (before, now):
        for name in CHANGEABLE:
            tree.pop(name, None)
    if changed := describe_differences(before, now):
        shown = "".join(f"\n  {line}" for line in changed[:20])
        raise RecipeError(
            f"output_dir {recipe.output_dir} holds a {what} with other settings; restore them, or use another "
            f"output_dir:{shown}"
        )


def open_run_folder(recipe: Recipe, *, resume: bool, continues: bool = False) -> Storage:
    """Return the run folder of a recipe; it may hold a run only with ``resume``, or an equal one with ``continues``.

    Raises RecipeError if the folder holds other files, or holds a run that may not be continued; CheckpointError if it
    holds a run of another method.
    """
    run = Storage(recipe.output_dir)
    if not is_resumed(recipe, RECIPE_FILE, what="run", resume=resume, continues=continues):
        return run
    before = yaml.safe_load(run.read_text(RECIPE_FILE))
    name, data = before["method"]["name"], before.get("data") or {}
    if "image_interpolation_mode" not in data and recipe.data.image_interpolation_mode != "lanczos":
        logger.warning(
            "this run began with a version that resized images with plain Lanczos; set data.image_interpolation_mode: "
            "lanczos to continue with the same pixels"
        )
    if name != recipe.method.name:
        raise CheckpointError(
            f"output_dir {recipe.output_dir} holds a run of {name}, and this recipe is for {recipe.method.name}; "
            f"use another output_dir"
        )
    return run


@contextmanager
def own(
    folder: Storage,
    owner: Owner | None = None,
    *,
    take_over: bool = False,
    wait: Callable[[], object] | None = None,
    say: Callable[[str], None] = logger.info,
) -> Iterator[Fence | Ownership]:
    """Own the folder of a run, search or fleet within this context; at the end, remove the files of a failed start.

    ``owner``: of the search or fleet that the run is part of, which owns the folder already. A start has failed if the
    folder holds nothing but log, lease and events. Other arguments and errors are those of :func:`hold`.
    """
    if owner is not None:
        yield Fence(folder, owner)
        return
    with hold(folder, take_over=take_over, wait=wait, is_left_over=_is_left_over, say=say) as ownership:
        yield ownership


def _is_left_over(folder: Storage) -> bool:
    if is_used(folder):
        return False
    for name in LEFTOVERS:
        if name != LEASE_FILE:
            folder.remove(name)
    return True
