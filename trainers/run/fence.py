"""Fences of a run: writes of a process that was replaced, such as a rank 0 cut off from the network, are refused."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from dreamfleet.datasets.errors import LeaseLost, Replaced
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.run.lease import Lease, LeaseFile, SystemTime

log = logging.getLogger(__name__)
CHECK_SECONDS = 1.0  # how long the result of a check counts for text appended to a log


@dataclass(frozen=True)
class Owner:
    """What processes that write for a driver need: the ID of its lease, and the address of the folder that has it.

    ``conditional``: whether the storage has conditional writes.
    """

    id: str
    folder: str
    conditional: bool = True


class Fence:
    """Refuses the writes of this process to ``run`` once it was replaced.

    Every rank has one; rank 0 calls :meth:`begin` at its start, as does a rank that takes over as rank 0. ``run`` is
    the owner's folder or one below it, such as a trial of a search, which then has a lease file with its own attempts.
    Without an owner only newer attempts count. Methods may be called by any thread.
    """

    def __init__(self, run: Storage, owner: Owner | None, *, clock: SystemTime | None = None):
        self.run, self.owner, self.clock = Storage(run), owner, clock or SystemTime()
        self.attempt = 0  # of this process; 0 before it began one
        self.since = ""  # when that attempt began (ISO 8601)
        self.is_first = True  # whether that is the first attempt of a new run, or none
        self.conditional = owner is None or owner.conditional
        self._file = LeaseFile(Storage(run), conditional=self.conditional, clock=self.clock)
        self._is_top = owner is None or Storage(owner.folder) == run
        self._top = self._file if self._is_top or owner is None else LeaseFile(Storage(owner.folder))
        self._lost: LeaseLost | None = None
        self._checked = -float("inf")
        self._lock = threading.RLock()

    def begin(self, *, step: int) -> int:
        """Begin an attempt at optimizer step ``step``; return its number. Raises LeaseLost.

        From then on the checks of all earlier attempts fail.
        """
        with self._lock:
            self._check_owner()

            def change(lease: Lease) -> Lease:
                if self._is_top:
                    self._compare_owner(lease)
                elif self.owner is not None:
                    lease = replace(lease, owner=self.owner.id, top=self.owner.folder, holder=None)
                return lease.with_attempt(step, now=self.clock.now(), above=self.attempt)

            lease = self._file.update(change)
            self.attempt, self.is_first = lease.attempt, lease.attempts[0] == lease.attempts[-1] and step == 0
            self.since = lease.attempts[-1].since
            return self.attempt

    def read(self) -> Lease:
        """Return the lease of the run, with its attempts."""
        return self._file.read()

    @property
    def is_lost(self) -> bool:
        """Whether a check has failed."""
        return self._lost is not None

    def guarded(self) -> Storage:
        """Return the run folder, whose writes this fence checks."""
        return self.run.guarded(self.check)

    def watched(self, should_stop: Callable[[], bool]) -> Callable[[], bool]:
        """Return ``should_stop``, which raises LeaseLost once a check of any thread has failed."""

        def stop() -> bool:
            if self._lost is not None:
                raise self._lost
            return should_stop()

        return stop

    def check(self, fresh: bool = True) -> None:
        """Raise LeaseLost if a newer owner exists, Replaced if a newer attempt does.

        Without ``fresh`` a recent check is enough.
        """
        with self._lock:
            if self._lost is not None:
                raise self._lost
            now = self.clock.monotonic()
            if not fresh and now - self._checked < CHECK_SECONDS:
                return
            top = self._check_owner()
            lease = top if self._is_top else self._file.read()
            if self.attempt and lease.attempt > self.attempt:
                newer = next(other for other in lease.attempts if other.number > self.attempt)
                self._lose(
                    f"attempt {self.attempt} of {self._file.folder.path()} was replaced by attempt {newer.number}, "
                    f"which began at step {newer.step} at {newer.since}",
                    Replaced,
                )
            self._checked = now

    def _check_owner(self) -> Lease:
        lease = self._top.read()
        self._compare_owner(lease)
        return lease

    def _compare_owner(self, lease: Lease) -> None:
        # A missing file, which somebody removed, is written again by its owner's next renewal.
        if self.owner is not None and lease.owner not in ("", self.owner.id):
            self._lose(
                f"{self.owner.folder} was taken over by {lease.describe(self.clock.now())}"
                if lease.holder
                else f"{self.owner.folder} was taken over"
            )

    def _lose(self, reason: str, kind: type[LeaseLost] = LeaseLost) -> None:
        self._lost = kind(f"{reason}; this process stops and writes nothing more")
        raise self._lost


def begin_attempt(run: Storage, owner: Owner | None, *, step: int, clock: SystemTime | None = None) -> Fence:
    """Begin an attempt of a run at a step, and return its fence. Raises LeaseLost."""
    fence = Fence(run, owner, clock=clock)
    fence.begin(step=step)
    return fence


@contextmanager
def unless_replaced() -> Iterator[None]:
    """Log a write that is refused because another process of the run writes now; other errors are raised."""
    try:
        yield
    except Replaced as error:
        log.info("not all was written before this process was replaced: %s", error)
