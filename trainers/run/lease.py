"""The lease of an output_dir, ``lease.json``: who owns the folder, and the attempts of its run, by number and step."""

from __future__ import annotations

import getpass
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from dreamfleet.datasets.errors import CheckpointError, StorageError
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.conditional import ABSENT
from dreamfleet.datasets.storage.storage import Storage

LEASE_FILE = "lease.json"
# An owner renews every 10 s (8,640 small writes a day), so that six renewals may fail before others may take the
# lease; and a renewal is seen within CONFIRM_SECONDS, however wrong the clocks of the machines are.
RENEW_SECONDS, EXPIRY_SECONDS, CONFIRM_SECONDS = 10.0, 60.0, 15.0
# Without conditional writes an owner reads its record again after this time, to see whether it was overwritten.
SETTLE_SECONDS = 3.0
#: Names the job of a process, for example by its ID; a restarted driver of a job takes over that job's lease at once.
JOB_VARIABLE = "DREAMFLEET_OWNER"
MOST_ATTEMPTS = 200  # that are remembered
_TRIES = 50  # conflicting writes in a row

State = Literal["free", "dead", "held", "unknown"]


class SystemTime:
    """The clocks of this machine; tests use others."""

    def now(self) -> float:
        """Return the seconds since 1970."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds that are never set back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


@dataclass(frozen=True)
class Holder:
    """A process that owns an output_dir.

    ``machine``: the boot of the machine and the namespace of ``pid``; ``started``: the process's start in clock ticks
    since that boot, as IDs of processes are used again; ``job``: see :data:`JOB_VARIABLE`.
    """

    user: str
    host: str
    pid: int
    machine: str = ""
    started: int = 0
    job: str = ""

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"{self.user}@{self.host} (pid {self.pid}{job})"


@dataclass(frozen=True)
class Attempt:
    """A start of the run's rank 0, or its replacement: attempt ``number`` began at optimizer step ``step``."""

    number: int
    step: int
    since: str = ""


@dataclass(frozen=True)
class Lease:
    """The content of ``lease.json``; an empty one stands for a missing file.

    ``owner`` is a unique ID of the process that holds it. ``since``, ``renewed`` and ``released`` are UTC times in ISO
    8601 ("" for never). ``top``: the address of the folder whose lease counts, for a trial of a search or a subject of
    a fleet. ``token`` differs in each write.
    """

    owner: str = ""
    holder: Holder | None = None
    since: str = ""
    renewed: str = ""
    released: str = ""
    top: str = ""
    attempts: tuple[Attempt, ...] = ()
    token: str = field(default="", compare=False)

    @property
    def attempt(self) -> int:
        """The number of the newest attempt; 0 before the first."""
        return self.attempts[-1].number if self.attempts else 0

    @property
    def is_free(self) -> bool:
        """Whether nobody holds it: it was never taken, or was released."""
        return self.holder is None or bool(self.released)

    def with_attempt(self, step: int, *, now: float, above: int = 0) -> Lease:
        """Return the lease with one more attempt, whose number is the next one, and greater than ``above``."""
        begun = Attempt(max(self.attempt, above) + 1, step, as_text(now))
        return replace(self, attempts=(*self.attempts, begun)[-MOST_ATTEMPTS:])

    def describe(self, now: float) -> str:
        """Return who holds it, since when, and when it was last renewed."""
        since = self.since[:19].replace("T", " ")
        return f"{self.holder} since {since} UTC, last renewed {max(0.0, now - seconds_of(self.renewed)):.0f} s ago"


def is_superseded(attempts: Iterable[Attempt], *, attempt: int, step: int) -> bool:
    """Return whether a checkpoint of ``step``, saved by ``attempt``, must not be used.

    It must not if a later attempt began before that step: the later one did not continue from it, so it was written by
    a process that had been replaced, or is damaged. ``attempt`` is 0 for checkpoints of versions without attempts.
    """
    return any(later.number > attempt and later.step < step for later in attempts)


def judge(lease: Lease, me: Holder, now: float, *, is_alive: Callable[[Holder], bool]) -> State:
    """Return whether a lease is free, its holder is dead or alive (``held``), or unknown from here.

    A process on another machine, or one that has not renewed for long, is unknown: only time will tell.
    """
    if lease.holder is None or lease.is_free:
        return "free"
    if not me.machine or lease.holder.machine != me.machine:
        # A job has one driver: if this one was started again elsewhere, the former has ended.
        return "dead" if lease.holder.job and lease.holder.job == me.job else "unknown"
    if not is_alive(lease.holder):
        return "dead"
    return "held" if now - seconds_of(lease.renewed) < EXPIRY_SECONDS else "unknown"


class LeaseFile:
    """Reads and changes the ``lease.json`` of a folder; ``conditional``: whether the storage has conditional writes."""

    def __init__(self, folder: Storage, *, conditional: bool = True, clock: SystemTime | None = None):
        self.folder, self.conditional, self.clock = folder, conditional, clock or SystemTime()

    def read(self) -> Lease:
        """Return the lease; an empty one if there is no file. Raises CheckpointError for a damaged file."""
        return self._decode(self.folder.read_version(LEASE_FILE)[0])

    def update(self, change: Callable[[Lease], Lease]) -> Lease:
        """Replace the lease by ``change(lease)``; return the new one.

        ``change`` is called again with the newer lease if another process wrote in between; it may raise to give up.
        """
        for attempt in range(_TRIES):
            content, version = self.folder.read_version(LEASE_FILE)
            lease = replace(change(self._decode(content)), token=secrets.token_hex(8))
            if self._write(_encode(lease), version):
                return lease
            self.clock.sleep(0.02 * attempt * secrets.randbelow(100) / 100)
        raise StorageError(
            f"{self.folder.path(LEASE_FILE)} could not be written: other processes keep changing it"
        )

    def remove(self, owner: str) -> None:
        """Remove the file if it is this owner's."""
        content, version = self.folder.read_version(LEASE_FILE)
        if version != ABSENT and self._decode(content).owner == owner:
            self.folder.remove_if(LEASE_FILE, version=version)

    def _write(self, data: bytes, version: str) -> bool:
        if self.conditional:
            return self.folder.write_if(LEASE_FILE, data, version=version)
        is_new = (
            not version or self._decode(self.folder.read_bytes(LEASE_FILE)).owner != json.loads(data)["owner"]
        )
        self.folder.write_bytes(LEASE_FILE, data)
        if is_new:  # a change of owner, for which others may compete
            self.clock.sleep(SETTLE_SECONDS)
        return not is_new or self.folder.read_bytes(LEASE_FILE) == data

    def _decode(self, content: bytes) -> Lease:
        if not content:
            return Lease()
        try:
            tree: dict[str, Any] = json.loads(content)
            holder, attempts = tree.pop("holder"), tree.pop("attempts")
            return Lease(
                **tree,
                holder=None if holder is None else Holder(**holder),
                attempts=tuple(Attempt(**attempt) for attempt in attempts),
            )
        except (ValueError, TypeError, KeyError) as error:
            path = self.folder.path(LEASE_FILE)
            raise CheckpointError(
                f"{path} cannot be read ({error}): remove it if no other process trains into this folder"
            ) from error


def _encode(lease: Lease) -> bytes:
    return (json_text(asdict(lease), indent=1) + "\n").encode()


def this_process() -> Holder:
    """Return the holder that this process would be."""
    return Holder(
        user=_user(),
        host=socket.gethostname(),
        pid=os.getpid(),
        machine=_machine(),
        started=_started(os.getpid()) or 0,
        job=os.environ.get(JOB_VARIABLE, ""),
    )


def is_alive(holder: Holder) -> bool:
    """Return whether a holder on this machine still runs."""
    started = _started(holder.pid)
    return started is not None and started == holder.started


def as_text(seconds: float) -> str:
    """Return a time in seconds since 1970 as UTC in ISO 8601."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def seconds_of(text: str) -> float:
    """Return the seconds since 1970 of a time in ISO 8601."""
    return datetime.fromisoformat(text).timestamp()


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())


def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def _started(pid: int) -> int | None:
    """Return the start time of a running process in clock ticks since the boot; None if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])  # a zombie has ended
