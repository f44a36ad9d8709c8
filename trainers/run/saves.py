"""Writes the checkpoints of a run in threads, while the run continues, on rank 0."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from dreamfleet.datasets.errors import RunFailed, StorageError, UserError
from dreamfleet.datasets.storage.background import UPLOADER, WRITER
from dreamfleet.datasets.storage.object_store import is_failing
from dreamfleet.trainers.report.events import EventLog, NoEvents
from dreamfleet.trainers.run.checkpoint import Checkpoints, folder_name
from dreamfleet.trainers.run.spool import Spool

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.1  # between two looks whether the bucket has failed while a save waits for the one before


class Saves:
    """The saves of one run, at most one in flight while its storage works.

    A save is written on this machine's disk, its manifest last: into the run folder, or, for a bucket, into a
    :class:`Spool`, from which another thread copies it into the bucket. If the bucket fails, that thread tries again
    within ``storage.patience`` while further saves go into the spool: of those only the newest and the best are kept.

    ``bests``: the steps of the best checkpoints so far, the newest last, appended by the owner. ``is_due``: whether a
    step is saved by the schedule; others are removed when they are no longer the best, and ``released`` ones when there
    is a newer one. ``after_save`` is called after
    each complete save. All methods are called by the thread of the run.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        bests: list[int],
        released: set[int] | None = None,
        is_due: Callable[[int], bool],
        after_save: Callable[[], None] = lambda: None,
        events: EventLog | None = None,
    ):
        self.checkpoints, self.bests = checkpoints, bests
        self.released = set() if released is None else released
        self.is_due, self.after_save = is_due, after_save
        self.events = events or NoEvents()
        self.error: Exception | None = None
        self._spool: Spool | None = None
        self._spooled: list[int] = []  # steps that wait for the bucket, oldest first
        self._lock = threading.Lock()  # guards the list
        self._write: Future[None] | None = None
        self._uploads: list[Future[None]] = []

    @property
    def has_failed(self) -> bool:
        """Whether a save failed for good; :meth:`require_room` and :meth:`finish` raise its error."""
        return self.error is not None

    def require_room(self) -> None:
        """Wait until the save before is stored, or, while the bucket is away, until it is on the disk.

        Raises the error of an earlier save that failed.
        """
        if self._write is not None:
            wait([self._write])
        while not self.has_failed and any(not upload.done() for upload in self._uploads):
            if is_failing(self.checkpoints.storage.url):
                break
            wait(self._uploads, timeout=LOOK_SECONDS)
        self._uploads = [upload for upload in self._uploads if not upload.done()]
        if self.error is not None:
            raise self.error

    def start(
        self, step: int, get_state: Callable[[], dict[str, Any]], meta: dict[str, Any], *, seconds: float
    ) -> None:
        """Begin to write the checkpoint of ``step``; call :meth:`require_room` before.

        ``get_state`` waits for ``learned`` and ``engine`` to be complete in host memory and returns them. They must
        not be changed before the next :meth:`require_room`. ``seconds``: how long the save stopped the training.
        """
        began = time.monotonic()
        self.events.tell("uploads", waiting=1 + len(self._spooled))

        def write() -> None:
            if (spool := self._open_spool()) is None:
                self.checkpoints.write(step, **get_state(), meta=meta)
                self._complete(step, seconds, began)
            else:
                spool.sign(self.checkpoints.fence)
                spool.checkpoints.write(step, **get_state(), meta=meta)
                self._enqueue(step, seconds, began)

        self._write = WRITER.submit(lambda: self._guarded(step, write))

    def tidy(self, newest: int) -> None:
        """Remove, after the saves before, what is neither the best nor among the newest up to ``newest``."""
        thread = WRITER if self.checkpoints.storage.is_local else UPLOADER
        self._uploads.append(thread.submit(lambda: self._guarded(newest, lambda: self._tidy(newest))))

    def finish(self) -> None:
        """Wait until every save is stored. Raises the error of one that failed."""
        self._wait()
        if self.error is not None:
            raise self.error
        if self._spool is not None:
            self._spool.close()
            self._spool = None

    def close(self, *, patiently: bool = True) -> None:
        """Wait for the saves after an error elsewhere, and log their own; not for uploads unless ``patiently``."""
        known = self.error
        if patiently:
            self._wait()
        elif self._write is not None:
            wait([self._write])
        if self.error is not None and self.error is not known:
            log.error("%s", self.error)
        if self._spool is not None:
            self._spool.close()

    def _wait(self) -> None:
        if self._write is not None:
            wait([self._write])  # it may append an upload
        wait(self._uploads)
        self._uploads = []

    def _open_spool(self) -> Spool | None:
        """Return the spool where checkpoints wait for the bucket; None for a run folder on disk."""
        if self._spool is None and not self.checkpoints.storage.is_local:
            self._spool = Spool(self.checkpoints.storage)
        return self._spool

    def _guarded(self, step: int, work: Callable[[], None]) -> None:
        """Run ``work`` unless an earlier save failed; keep its error for the thread of the run."""
        if self.error is not None:
            return
        try:
            work()
        except StorageError as error:
            explained = self.checkpoints.explain(step, error)
            self.error = StorageError(f"{explained}{self._describe_spooled()}")
            self.error.__cause__ = error
        except Exception as error:  # noqa: BLE001 - raised by the thread of the run
            self.error = error

    def _enqueue(self, step: int, seconds: float, began: float) -> None:
        with self._lock:
            self._spooled.append(step)
        if is_failing(self.checkpoints.storage.url):
            self.events.add("save_retry", step=step)
            self._replace_older()
        self._uploads.append(
            UPLOADER.submit(lambda: self._guarded(step, lambda: self._upload(step, seconds, began)))
        )

    def _upload(self, step: int, seconds: float, began: float) -> None:
        assert self._spool is not None
        with self._lock:
            if step not in self._spooled:  # replaced by a newer save
                return
        self.checkpoints.adopt(self._spool.checkpoints, step)
        with self._lock:
            self._spooled.remove(step)
        self._spool.checkpoints.drop(step)
        self._complete(step, seconds, began)

    def _replace_older(self) -> None:
        """Drop spooled saves except the newest, the best, those in use, and the one that is being copied."""
        assert self._spool is not None
        with self._lock:
            best = next((step for step in reversed(self.bests) if step in self._spooled), None)
            kept = {self._spooled[0], self._spooled[-1], best, *self.checkpoints.in_use}
            dropped = [step for step in self._spooled if step not in kept]
            self._spooled = [step for step in self._spooled if step in kept]
        for step in dropped:
            log.info(
                "the checkpoint of step %d is replaced by a newer one, before it reached the bucket", step
            )
            self._spool.checkpoints.drop(step)

    def _complete(self, step: int, seconds: float, began: float) -> None:
        self._tidy(step)
        self.events.add("save", step=step, seconds=seconds, background_seconds=time.monotonic() - began)
        self.events.tell("uploads", waiting=len(self._spooled))
        try:
            self.after_save()
        except (
            UserError,
            RunFailed,
        ) as error:  # the checkpoint is complete, and what follows it is tried again
            log.warning("after the checkpoint of step %d: %s", step, error)

    def _tidy(self, newest: int) -> None:
        stored = self.checkpoints.steps()
        # A best checkpoint that is not stored yet does not release the one before.
        best = next((step for step in reversed(self.bests) if step in stored), None)
        kept = {best, *self.checkpoints.in_use}
        for step in dict.fromkeys([*self.bests, *(self.released - {newest})]):
            if step in stored and step not in kept and not self.is_due(step):
                self.checkpoints.drop(step)
        self.checkpoints.best = best
        self.checkpoints.prune(newest)

    def _describe_spooled(self) -> str:
        with self._lock:
            steps = list(self._spooled)
        if not steps or self._spool is None:
            return ""
        places = ", ".join(self._spool.path(folder_name(step)) for step in steps)
        kept = "of which the next start with --resume stores the newest if its rank 0 runs there"
        return f". Complete on the disk of {socket.gethostname()}, {kept}: {places}"
