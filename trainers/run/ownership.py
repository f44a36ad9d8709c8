"""Ownership of an output_dir: exactly one process trains into it, whatever storage it is on.

The driver holds the folder's lease (:func:`hold`). Rank 0 of each start begins an attempt (:mod:`fence`), whose number
is the fencing token: its writes check that no newer attempt or owner exists.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dreamfleet.datasets.errors import LeaseLost, RunFailed, UserError
from dreamfleet.datasets.storage.conditional import lock_name, supports_conditions
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.run.claim import claim
from dreamfleet.trainers.run.fence import Fence, Owner
from dreamfleet.trainers.run.lease import (
    LEASE_FILE,
    RENEW_SECONDS,
    SETTLE_SECONDS,
    Lease,
    LeaseFile,
    SystemTime,
    as_text,
    this_process,
)

RELEASE_SECONDS = 20.0  # for the last write of a command whose run has ended
QUIET_SECONDS = 60.0  # between two warnings about failed renewals

log = logging.getLogger(__name__)


class Ownership:
    """An output_dir that this process owns: :func:`hold` yields it."""

    def __init__(self, file: LeaseFile, lease: Lease, *, say: Callable[[str], None]):
        self.file, self.lease, self.say = file, lease, say
        self.owner = Owner(lease.owner, file.folder.path(), file.conditional)
        self.lost: LeaseLost | None = None
        self._fence = Fence(file.folder, self.owner, clock=file.clock)
        self._done = threading.Event()
        self._warned = -float("inf")
        self._thread = threading.Thread(target=self._renew_on_time, daemon=True, name="lease")

    @property
    def is_lost(self) -> bool:
        """Whether another process has taken over the folder."""
        return self.lost is not None

    def check(self, fresh: bool = True) -> None:
        """Raise LeaseLost if another process has taken over the folder."""
        if self.lost is not None:
            raise self.lost
        self._fence.check(fresh)

    def renew(self) -> None:
        """Renew the lease. A failure is logged: nobody else may take the lease before it expires."""
        try:
            self.lease = self.file.update(self._renewed)
        except LeaseLost as error:
            self.lost = error
            self.say(str(error))
        except (UserError, OSError) as error:
            if self.file.clock.monotonic() - self._warned >= QUIET_SECONDS:
                self._warned = self.file.clock.monotonic()
                log.warning("the lease of %s is not renewed yet: %s", self.owner.folder, error)

    def release(self) -> None:
        """Release the lease, if it is still this process's."""
        self.file.update(lambda lease: replace(self._renewed(lease), released=as_text(self.file.clock.now())))

    def start(self) -> None:
        """Start to renew the lease in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; if a request is stuck, do not wait for it."""
        self._done.set()
        self._thread.join(timeout=5)

    def _renewed(self, lease: Lease) -> Lease:
        if lease.owner != self.owner.id and lease.owner:
            raise LeaseLost(
                f"{self.owner.folder} was taken over by {lease.describe(self.file.clock.now())}; this process stops "
                "and writes nothing more"
            )
        lease = lease if lease.owner else self.lease  # somebody removed the file
        return replace(lease, renewed=as_text(self.file.clock.now()))

    def _renew_on_time(self) -> None:
        while not self._done.wait(RENEW_SECONDS) and not self.is_lost:
            self.renew()


@contextmanager
def hold(
    folder: Storage,
    *,
    take_over: bool = False,
    wait: Callable[[], object] | None = None,
    is_left_over: Callable[[Storage], bool] = lambda folder: False,
    say: Callable[[str], None] = log.info,
    clock: SystemTime | None = None,
) -> Iterator[Ownership]:
    """Own an output_dir within this context, as the only process on any machine.

    A lease whose holder ended on this machine is taken at once, an expired one after a time in which a living holder
    would have renewed it. ``take_over``: take it from anyone, who then stops at the next write. ``wait``: do not raise
    while another process holds it, but call this function every few seconds, which may raise, until it is released.
    ``is_left_over`` is asked at the end whether the folder's start failed, so that the lease is removed as well.

    Raises Held (a RecipeError) if another process holds the folder, StorageError if it cannot be written.
    """
    is_new = folder.is_local and not folder.exists()
    folder = Storage(folder)
    try:
        file = LeaseFile(folder, conditional=_has_conditions(folder, say), clock=clock)
        lease = claim(file, this_process(), take_over=take_over, wait=wait, say=say)
        ownership = Ownership(file, lease, say=say)
        ownership.start()
        try:
            yield ownership
        finally:
            ownership.stop()
            _within(RELEASE_SECONDS, lambda: _end(ownership, is_left_over), folder)
    finally:
        if is_new:
            _remove_unused(Path(folder.path()))


def _end(ownership: Ownership, is_left_over: Callable[[Storage], bool]) -> None:
    # Errors: the bucket cannot be reached, or the folder was taken over.
    with contextlib.suppress(UserError, RunFailed, OSError):
        if is_left_over(ownership.file.folder):
            ownership.file.remove(ownership.owner.id)
        else:
            ownership.release()


def _within(seconds: float, end: Callable[[], None], folder: Storage) -> None:
    """Call ``end`` in a thread, and wait for at most ``seconds``: a command does not outlast its run for a lease."""
    thread = threading.Thread(target=end, daemon=True, name="lease-release")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        log.warning(
            "the lease of %s is not released, since its storage does not answer: it expires by itself",
            folder.url,
        )


def _has_conditions(folder: Storage, say: Callable[[str], None]) -> bool:
    if supports_conditions(folder):
        return True
    say(
        f"WARNING: the storage of {folder.url} has no conditional writes (see `dreamfleet doctor`): of processes "
        f"that start in it within {SETTLE_SECONDS:.0f} s of each other usually one is refused, and otherwise one ends "
        f"within {RENEW_SECONDS:.0f} s, when it sees the other's lease"
    )
    return False


def _remove_unused(folder: Path) -> None:
    """Remove a folder that was created for a start that failed, if it is empty but for the lock of the lease."""
    lock = lock_name(LEASE_FILE)
    with contextlib.suppress(OSError):
        if all(path.name == lock for path in folder.iterdir()):
            (folder / lock).unlink(missing_ok=True)
            folder.rmdir()
