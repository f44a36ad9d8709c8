"""Holds a run folder while this process trains into it, and turns signals into its stop mark."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from dreamfleet.datasets.errors import RecipeError, StorageError, UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.driver.progress import LOG_FILE, STOP_FILE, Display
from dreamfleet.trainers.driver.shared_paths import MARKER

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LEFTOVERS = (LOG_FILE, STOP_FILE)  # of an attempt that ended before it was a run

logger = logging.getLogger(__name__)


class Stop:
    """What the person asked for by SIGINT or SIGTERM: to save and end (once), or to end at once (twice)."""

    def __init__(self, run: Storage, display: Display):
        self.run, self.display = run, display
        self.asked = threading.Event()

    def listen(self) -> None:
        """Take the signals over, also from Ray, which installs handlers of its own when it starts."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._ask)

    def _ask(self, signum: int, frame: Any) -> None:
        if self.asked.is_set():
            raise KeyboardInterrupt
        self.asked.set()
        # Not in the handler itself: it may have interrupted a write to this very stream.
        threading.Thread(target=self._mark, daemon=True).start()

    def _mark(self) -> None:
        self.display.say("stopping: a checkpoint is being saved (once more to stop at once, without one)")
        try:
            self.run.write_text(STOP_FILE, "")
        except UserError as error:  # a bucket that is away
            self.display.say(f"the workers were not told to stop: {error}; once more ends at once")


@contextmanager
def stop_on_signal(run: Storage, display: Display) -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into the stop mark that workers look for; not outside the main thread.

    A run that is left in a hurry keeps its mark, so that workers which outlive the driver end too.
    """
    stop = Stop(run, display)
    with contextlib.suppress(UserError):
        run.remove(STOP_FILE)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop.listen()
    try:
        yield stop
        if stop.asked.is_set():
            with contextlib.suppress(UserError):
                run.remove(STOP_FILE)
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def is_used(folder: Storage) -> bool:
    """Say whether a folder holds more than what an attempt that ended early may leave: log, marks, empty folders."""
    if any(name not in LEFTOVERS and not name.startswith(MARKER) for name in folder.list()):
        return True
    return any(folder.has_files(name) for name in folder.list_dirs())


@contextmanager
def claimed(run: Storage) -> Iterator[None]:
    """Hold a run folder for this process, and leave nothing behind in one that never became a run.

    Raises RecipeError when another process trains into it now, StorageError when it cannot be made. On a disk the
    folder itself is locked, and the lock ends with the process. That excludes other processes of this machine; those of
    another machine that mounts the folder are not seen on every file system, and in a bucket nobody is.
    """
    with _held(Path(run.path())) if run.is_local else contextlib.nullcontext():
        try:
            yield
        finally:
            with contextlib.suppress(UserError):  # a bucket that is away
                if not run.exists("recipe.yaml"):
                    for name in LEFTOVERS:
                        run.remove(name)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Lock a folder; one that was made here and is empty at the end is removed."""
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"output_dir {folder} cannot be made: {error.strerror}; give another") from error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        if new:
            with contextlib.suppress(OSError):  # it holds a run
                folder.rmdir()
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        locked = lock_descriptor(descriptor, blocking=False)
    except OSError as error:  # some network file systems have no locks
        logger.debug("%s cannot be locked: %s", folder, error)
        return
    if not locked:
        raise RecipeError(
            f"output_dir {folder}: another process is training into it right now; wait for it, or give another"
        )
