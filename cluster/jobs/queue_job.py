"""The job that holds a queue of runs: ``python -m dreamfleet.cluster.jobs.keep queue run FOLDER``.

It starts each run as a Ray job of its own when the run's whole gang of workers fits: a placement group of the gang's
size is reserved, which Ray grants completely or not at all, and kept until the run asks for its own. All state is in
the queue's folder, so another queue job continues after this one, or the cluster, has died.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dreamfleet.cluster.jobs import queue
from dreamfleet.cluster.jobs.client import JobServer, job_server
from dreamfleet.cluster.jobs.gangs import Gangs
from dreamfleet.cluster.jobs.job import Job
from dreamfleet.cluster.jobs.package import RECIPE_FILE
from dreamfleet.cluster.jobs.queue import STARTED, Entry
from dreamfleet.cluster.jobs.queue_folder import QueueFolder
from dreamfleet.cluster.jobs.submit import ADDED, send_entry
from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.scaling import ScalingConfig
from dreamfleet.trainers.driver.session import RaySession

TICK_SECONDS = 2.0
PATIENCE_SECONDS = 10.0  # so long a run waits for room before it preempts others
RELEASE_SECONDS = 60.0  # the same after others made room: Ray frees what they held with a delay
GROWTH_SECONDS = 300.0  # the same on a cluster that can start machines

Say = Callable[[str], None]


class Queue:
    """One pass of :meth:`tick` follows the runs, and starts or preempts at most what the next run needs."""

    def __init__(self, folder: QueueFolder, server: JobServer, gangs: Gangs, say: Say):
        self.folder, self.server, self.gangs, self.say = folder, server, gangs, say
        self._starting: str | None = None  # ID of the run whose room is reserved until it asks for its own
        self._room_made_for: str | None = None  # ID of the run for which others were preempted
        self._shown = ""

    def tick(self) -> bool:
        """Do what is due; return whether any run is waiting or running."""
        jobs = {job.id: job for job in self.server.jobs()}
        entries = [self._follow(entry, jobs.get(entry.job)) for entry in self.folder.entries()]
        granted = self.server.gangs()
        # Of the runs that have started: whether they have their workers, or None if they have not asked for them yet.
        placed = {
            entry.id: granted.get(str(jobs[entry.job].driver))
            for entry in entries
            if entry.state in STARTED and entry.job in jobs
        }
        if self._starting is not None and placed.get(self._starting, False) is not None:
            self.gangs.release()
            self._starting = None
        ended = (jobs[entry.job] for entry in entries if entry.id not in placed and entry.job in jobs)
        if any(entry.state == "PREEMPTING" for entry in entries) or any(
            granted.get(str(job.driver)) for job in ended
        ):
            self.gangs.wait_again()  # room is being made: Ray takes a while to free the workers of a job that ended
        if self._starting is None:
            entries = self._advance(entries, placed)
        self._show(entries)
        return any(not entry.is_over for entry in entries)

    def _follow(self, entry: Entry, job: Job | None) -> Entry:
        entry = self._cancel(queue.settle(entry, job))
        self.folder.write(entry)
        return entry

    def _cancel(self, entry: Entry) -> Entry:
        if entry.id not in self.folder.cancelled():
            return entry
        self.folder.forget_cancel(entry.id)
        if entry.state == "WAITING":
            return replace(entry, state="STOPPED", reason="")
        if entry.state in STARTED:
            self.server.stop(entry.job)
            return replace(entry, state="RUNNING")  # not preempted any more: it stays stopped
        return entry

    def _advance(self, entries: list[Entry], placed: Mapping[str, bool | None]) -> list[Entry]:
        """Start the next run if its gang fits, or make room for it."""
        wanted = queue.next_entry(entries)
        waiting = [entry.priority for entry in entries if entry.id in placed and not placed[entry.id]]
        if wanted is None or wanted.priority <= max(waiting, default=wanted.priority - 1):
            self.gangs.release()  # room goes to the runs that have started and wait for their workers
            return entries
        try:
            ready = self.gangs.reserve(wanted, self._scaling(wanted))
            changed = self._start(wanted) if ready else self._preempt(wanted, entries, placed)
        except (
            UserError
        ) as error:  # of this run alone: its recipe, or resources that the cluster can never have
            self.gangs.release()
            changed = [replace(wanted, state="FAILED", reason=str(error))]
        for entry in changed:
            self.folder.write(entry)
        by_id = {entry.id: entry for entry in changed}
        return [by_id.get(entry.id, entry) for entry in entries]

    def _start(self, wanted: Entry) -> list[Entry]:
        started = replace(wanted, state="RUNNING", starts=wanted.starts + 1, reason="")
        self.folder.write(started)  # first, so that no start is ever forgotten
        with tempfile.TemporaryDirectory(prefix="dreamfleet-") as folder:
            package, code = self.folder.unpack(started, Path(folder))
            send_entry(self.server, started, package, code, recipe=read_recipe(package))
        self._starting = started.id
        self._room_made_for = None
        return [started]

    def _preempt(
        self, wanted: Entry, entries: Sequence[Entry], placed: Mapping[str, bool | None]
    ) -> list[Entry]:
        if self.gangs.waited < self._patience(wanted):
            return []
        running = [
            (entry, self.gangs.needs(entry, self._scaling(entry)) if placed.get(entry.id) else {})
            for entry in entries
            if entry.state in STARTED
        ]
        needs = self.gangs.needs(wanted, self._scaling(wanted))
        chosen = queue.victims(wanted, needs, self.gangs.session.free(), running)
        for entry in chosen:
            self.say(
                f"{entry.id} (priority {entry.priority}) saves and makes room for {wanted.id} ({wanted.priority})"
            )
            self.server.stop(entry.job)
            self._room_made_for = wanted.id
        return [replace(entry, state="PREEMPTING") for entry in chosen]

    def _patience(self, wanted: Entry) -> float:
        """Return the seconds that a run waits for room before it preempts others."""
        if self.gangs.session.growth_limit():
            return GROWTH_SECONDS
        return RELEASE_SECONDS if self._room_made_for == wanted.id else PATIENCE_SECONDS

    def _scaling(self, entry: Entry) -> Callable[[], ScalingConfig]:
        def read() -> ScalingConfig:
            with tempfile.TemporaryDirectory(prefix="dreamfleet-") as folder:
                package, _ = self.folder.unpack(entry, Path(folder))
                return ScalingConfig.model_validate(read_recipe(package).get("scaling") or {})

        return read

    def _show(self, entries: Sequence[Entry]) -> None:
        ordered = sorted(entries, key=lambda entry: (-entry.priority, entry.order))
        text = json_text([queue.describe(entry) for entry in ordered])
        if text != self._shown:
            self._shown = text
            self.say(queue.STATUS + text)


def read_recipe(package: Path) -> dict[str, Any]:
    """Return the recipe in a package, as plain data."""
    import yaml

    with zipfile.ZipFile(package) as archive:
        found: dict[str, Any] = yaml.safe_load(archive.read(RECIPE_FILE))
    return found


def add_entries(folder: QueueFolder, source: Path, say: Say) -> bool:
    """Add the entries of a job's package to a queue; return whether all were accepted."""
    import json

    code = folder.add_code()
    before = {entry.id: entry for entry in folder.entries()}
    accepted = True
    for given in json.loads((source / "entries.json").read_text()):
        options, variables = tuple(given.pop("options")), tuple(map(tuple, given.pop("variables")))
        entry = Entry(**{**given, "code": code}, options=options, variables=variables)
        found = queue.add(entry, before.get(entry.id))
        if found is None:
            accepted = False
            say(f"{entry.id} is running with other settings; stop it first: dreamfleet stop {entry.id}")
            continue
        folder.add_package(entry, (source / f"{entry.id}.zip").read_bytes())
        folder.write(found)
        say(f"{entry.id}: {found.state.lower()}, priority {found.priority}")
    return accepted


def hold_queue(folder: Storage, say: Say) -> bool:
    """Hold the queue until it is empty; return whether no run failed. Returns at once if another job holds it."""
    from dreamfleet.trainers.run.claim import Held
    from dreamfleet.trainers.run.ownership import hold

    own = QueueFolder(folder)
    while any(not entry.is_over for entry in own.entries()):  # again: some may come while the queue is closed
        try:
            with hold(folder), _session() as (session, server):
                tail(own, session, server, say)
        except Held as error:
            say(f"the queue is held already, and takes these runs: {error}")
            return True
    return not any(entry.state == "FAILED" for entry in own.entries())


def tail(folder: QueueFolder, session: RaySession, server: JobServer, say: Say) -> None:
    """Run the queue until nothing waits or runs, or until SIGTERM; runs go on without it."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    gangs = Gangs(session)
    held = Queue(folder, server, gangs, say)
    try:
        while not stop.is_set():
            try:
                if not held.tick():
                    return
            except UserError as error:  # the storage or the job server, for a moment
                say(f"trying again: {error}")
            stop.wait(TICK_SECONDS)
        raise SystemExit(130)
    finally:
        gangs.release()


@contextlib.contextmanager
def _session() -> Iterator[tuple[RaySession, JobServer]]:
    import ray

    context = ray.init(
        address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False, logging_level=logging.ERROR
    )
    try:
        with job_server(f"http://{context.dashboard_url}") as server:
            yield RaySession(private=False, address=context.address_info["address"]), server
    finally:
        ray.shutdown()


def main(arguments: Sequence[str]) -> int:
    """Do ``run FOLDER``: add this job's entries and hold the queue; or ``cancel FOLDER ID``: stop an entry."""
    name, url, *rest = arguments
    folder = Storage(url)
    try:
        if name == "cancel":
            QueueFolder(folder).cancel(rest[0])
            return 0
        accepted = add_entries(QueueFolder(folder), Path(ADDED), _say) if Path(ADDED).exists() else True
        return 0 if hold_queue(folder, _say) and accepted else 1
    except UserError as error:
        _say(f"dreamfleet: {error}")
        return 2


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
