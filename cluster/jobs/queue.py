"""Decisions of the queue of runs: which run starts next, which one makes room for it, and what became of a run.

Pure functions of the entries and of what Ray reports; :mod:`queue_job` carries them out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dreamfleet.cluster.jobs.job import Job

State = Literal["WAITING", "RUNNING", "PREEMPTING", "SUCCEEDED", "FAILED", "STOPPED"]
STARTED: tuple[State, ...] = ("RUNNING", "PREEMPTING")
STATUS = "queue: "  # begins the line of a queue's log that `dreamfleet jobs` reads
MAX_CRASHES = 3  # a run whose node or driver dies is started again so often


@dataclass(frozen=True)
class Entry:
    """A run in the queue. ``order`` is its place among runs of equal priority: smaller ones start first.

    ``batch`` names the runs that were submitted together; at most ``max_running`` of them run at once.
    """

    id: str
    output_dir: str
    package: str  # digest of recipe and files
    code: str  # digest of dreamfleet's code
    order: float
    priority: int = 0
    batch: str = ""
    max_running: int | None = None
    state: State = "WAITING"
    reason: str = ""
    starts: int = 0
    crashes: int = 0
    options: tuple[str, ...] = ()  # of `train`
    variables: tuple[tuple[str, str], ...] = ()  # of the environment
    command: str = "train"  # as it was typed

    @property
    def job(self) -> str:
        """ID of the Ray job of its newest start."""
        return f"{self.id}-{self.starts}"

    @property
    def is_over(self) -> bool:
        """Whether it will not run again by itself."""
        return self.state in ("SUCCEEDED", "FAILED", "STOPPED")


def add(new: Entry, before: Entry | None) -> Entry | None:
    """Return the entry to store for a submitted run; None if one with other settings is running under its name.

    A run that is waiting or running keeps its place and gets the new priority; one that ended is queued again, and
    continues from its newest checkpoint.
    """
    if before is None:
        return new
    if before.state in STARTED:
        same = before.package == new.package
        return (
            replace(before, priority=new.priority, max_running=new.max_running, batch=new.batch)
            if same
            else None
        )
    order = before.order if before.state == "WAITING" else new.order
    return replace(new, order=order, starts=before.starts)


def settle(entry: Entry, job: Job | None) -> Entry:
    """Return an entry after what Ray reports of its job; None: the cluster has no such job, for it was restarted."""
    if entry.state not in STARTED or (job is not None and not job.is_over):
        return entry
    if job is None:
        return replace(entry, state="WAITING", reason="its cluster was restarted")
    if job.state == "SUCCEEDED":
        return replace(entry, state="SUCCEEDED", reason="")
    if job.state == "STOPPED":
        if entry.state == "PREEMPTING":
            return replace(entry, state="WAITING", reason="preempted by a run of higher priority")
        return replace(entry, state="STOPPED", reason="")
    code = job.driver_exit_code
    if code == 130:  # it saved and ended because its machine did
        return replace(entry, state="WAITING", reason="interrupted after saving a checkpoint")
    died = (code is None and job.began) or (code is not None and (code < 0 or code > 128))
    if died and entry.crashes + 1 < MAX_CRASHES:
        return replace(entry, state="WAITING", crashes=entry.crashes + 1, reason=job.reason or "")
    return replace(entry, state="FAILED", reason=job.reason or "")


def next_entry(entries: Sequence[Entry]) -> Entry | None:
    """Return the run that starts next: the first of the highest priority whose batch may run another; None without."""
    running: dict[str, int] = {}
    for entry in entries:
        if entry.state in STARTED:
            running[entry.batch] = running.get(entry.batch, 0) + 1
    for entry in sorted(entries, key=lambda entry: (-entry.priority, entry.order)):
        full = entry.max_running is not None and running.get(entry.batch, 0) >= entry.max_running
        if entry.state == "WAITING" and not full:
            return entry
    return None


def victims(
    wanted: Entry,
    needs: Mapping[str, float],
    free: Mapping[str, float],
    running: Sequence[tuple[Entry, Mapping[str, float]]],
) -> list[Entry]:
    """Return the runs to preempt so that ``wanted`` fits: of lower priority, the lowest and newest first.

    ``needs`` and ``free`` are sums of resources, ``running`` the started runs with what they hold: nothing, for a run
    that still waits for its workers. Returns [] if even all of them would not be enough, so that no run is stopped in
    vain, and while earlier victims are still saving.
    """
    if any(entry.state == "PREEMPTING" for entry, _ in running):
        return []
    room = dict(free)
    chosen: list[Entry] = []
    lower = [(entry, share) for entry, share in running if entry.priority < wanted.priority]
    for entry, share in sorted(lower, key=lambda item: (item[0].priority, bool(item[1]), -item[0].order)):
        if _fits(needs, room):
            break
        chosen.append(entry)
        for name, amount in share.items():
            room[name] = room.get(name, 0.0) + amount
    return chosen if _fits(needs, room) else []


def describe(entry: Entry) -> dict[str, Any]:
    """Return what `dreamfleet jobs` shows of an entry."""
    return {
        "id": entry.id,
        "state": entry.state,
        "priority": entry.priority,
        "command": entry.command,
        "output_dir": entry.output_dir,
        "job": entry.job if entry.starts else None,
        "reason": entry.reason,
    }


def _fits(needs: Mapping[str, float], room: Mapping[str, float]) -> bool:
    return all(room.get(name, 0.0) >= amount - 1e-6 for name, amount in needs.items())
