"""Opens, checks and locks run folders; defines the names of their metrics, log, stop and marker files."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import lock_descriptor

from dreamfleet.datasets.errors import CheckpointError, RecipeError, StorageError, UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.report.events import FOLDER as EVENTS

METRICS_FILE = "metrics.jsonl"
LOG_FILE = "run.log"
STOP_FILE = "STOP"  # written by the driver or by a user: the run then saves a checkpoint and ends
MARKER_PREFIX = ".seen-"  # of files that test whether machines share a folder
# Files and folders that may remain after a start that failed before training
LEFTOVERS = (LOG_FILE, STOP_FILE, EVENTS, "hangs")

logger = logging.getLogger(__name__)


def is_used(folder: Storage) -> bool:
    """Return whether a folder holds more than log, stop file, markers and empty folders of a failed start."""
    if any(name not in LEFTOVERS and not name.startswith(MARKER_PREFIX) for name in folder.list()):
        return True
    return any(folder.has_files(name) for name in folder.list_dirs() if name not in LEFTOVERS)


def is_resumed(recipe: Recipe, marker: str, *, what: str, resume: bool) -> bool:
    """Return whether ``output_dir`` holds a run, search or fleet (``what``) to continue; False if it is unused.

    ``marker`` is a file that every such folder has. Raises RecipeError if the folder holds other files, or holds one
    and ``resume`` is False.
    """
    folder = Storage(recipe.output_dir)
    if not folder.exists(marker):
        if is_used(folder):
            raise RecipeError(
                f"output_dir {recipe.output_dir} is not empty and holds no {what}; use another output_dir"
            )
        return False
    if not resume:
        raise RecipeError(
            f"output_dir {recipe.output_dir} holds a {what} already; continue it with --resume, or use another "
            "output_dir"
        )
    return True


def open_run_folder(recipe: Recipe, *, resume: bool) -> Storage:
    """Return the run folder of a recipe; it may hold a run only with ``resume``.

    Raises RecipeError if the folder holds other files, or holds a run and ``resume`` is False;
    CheckpointError if it holds a run of another method.
    """
    run = Storage(recipe.output_dir)
    if not is_resumed(recipe, "recipe.yaml", what="run", resume=resume):
        return run
    import yaml

    before = yaml.safe_load(run.read_text("recipe.yaml"))["method"]["name"]
    if before != recipe.method.name:
        raise CheckpointError(
            f"output_dir {recipe.output_dir} holds a run of {before}, and this recipe is for {recipe.method.name}; "
            f"use another output_dir"
        )
    return run


@contextmanager
def locked(run: Storage) -> Iterator[None]:
    """Lock a run folder within this context; at the end, remove the files and folder of a failed start.

    Raises RecipeError if another process trains into the folder, StorageError if it cannot be created. The
    lock is on the local folder itself (no lock file) and ends with the process at the latest. It excludes
    processes of this machine; whether it excludes other machines that mount the folder depends on the file
    system. Buckets are not locked. A start has failed if the folder has no ``recipe.yaml``.
    """
    with _locked_on_disk(Path(run.path())) if run.is_local else contextlib.nullcontext():
        try:
            yield
        finally:
            with contextlib.suppress(UserError):  # the bucket cannot be reached
                if not run.exists("recipe.yaml"):
                    for name in LEFTOVERS:
                        run.remove(name)


@contextmanager
def _locked_on_disk(folder: Path) -> Iterator[None]:
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"output_dir {folder} cannot be created: {error.strerror}; use another output_dir"
        ) from error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # not empty: it holds a run
                folder.rmdir()
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        locked = lock_descriptor(descriptor, blocking=False)
    except OSError as error:  # for example a network file system without locks
        logger.debug("%s cannot be locked: %s", folder, error)
        return
    if not locked:
        raise RecipeError(
            f"output_dir {folder}: another process is training into it now; wait until it ends, or use another "
            "output_dir"
        )
