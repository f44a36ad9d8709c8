"""Gives the tasks of a source to workers until all have ended, and replaces workers that die."""

from __future__ import annotations

import dataclasses
import logging
import queue
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dreamfleet.datasets.errors import RunFailed
from dreamfleet.trainers.driver.failures import FailureBudget
from dreamfleet.trainers.packing.task import End, Task, TaskSource
from dreamfleet.tune.pool.retry import After, after_death
from dreamfleet.tune.pool.worker import Died, Ended, Event, Ready, Round, Started, Worker

SECONDS_BETWEEN_QUESTIONS = 0.2  # the source is asked again, and signals are seen, at least this often
FAILED_STARTS = 3  # successive workers that die before they are ready; more end the pool

Events = queue.SimpleQueue[tuple[Worker, Event]]
log = logging.getLogger(__name__)


@dataclass
class Job:
    """A task that was given out, and what the driver knows of it."""

    task: Task
    budget: FailureBudget
    deaths: int = 0
    alone: bool = False
    started: bool = False
    asked: bool = False  # a round was passed on, and the source has not decided yet
    stopped: bool = False  # the source has decided to stop it
    rounds: deque[dict[str, Any]] = field(default_factory=deque)  # not passed on yet


@dataclass
class Seat:
    """A worker and its jobs by name."""

    worker: Worker
    slots: int = 1
    ready: bool = False
    retired: bool = False  # gets no more tasks, and is replaced when it has none left
    jobs: dict[str, Job] = field(default_factory=dict)

    def accepts(self, job: Job) -> bool:
        """Return whether the worker has a free slot for the job."""
        if not self.ready or self.retired or any(other.alone for other in self.jobs.values()):
            return False
        return not self.jobs if job.alone else len(self.jobs) < self.slots


class Dispatcher:
    """Runs the tasks of ``source`` on ``num_workers`` workers made by ``make_worker``, ``slots`` tasks on each.

    ``events`` is the queue into which the workers put their events. ``max_failures``: deaths of its worker that a task
    survives between two checkpoints; ``newest_checkpoint`` returns the step of a task's newest one. All calls of the
    source come from the thread that calls :meth:`run`.
    """

    def __init__(
        self,
        source: TaskSource,
        make_worker: Callable[[], Worker],
        events: Events,
        *,
        num_workers: int,
        slots: int = 1,
        max_concurrent: int | None = None,
        max_failures: int = 3,
        newest_checkpoint: Callable[[Task], int | None] = lambda task: None,
    ):
        self.source, self.make_worker, self.events = source, make_worker, events
        self.num_workers, self.slots = num_workers, slots
        self.max_concurrent = max_concurrent or num_workers * slots
        self.max_failures, self.newest_checkpoint = max_failures, newest_checkpoint
        self.seats: list[Seat] = []
        self.waiting: list[Job] = []  # to be started again
        self.held: Task | None = None  # from the source, without a free slot yet
        self.failed_starts = 0
        self.stopping = False

    def run(self, should_stop: Callable[[], bool]) -> bool:
        """Run all tasks; return False if ``should_stop`` ended it before that.

        Each task that the source gave out has then got its ``on_end``. Raises RunFailed if no worker can be started.
        """
        try:
            self._fill()
            while not self._is_over():
                if not self.stopping and should_stop():
                    self._stop()
                self._receive()
                self._decide()
                self._fill()
        finally:
            for seat in self.seats:
                seat.worker.close()
        return not self.stopping

    @property
    def jobs(self) -> list[Job]:
        """The tasks that workers have now."""
        return [job for seat in self.seats for job in seat.jobs.values()]

    def _is_over(self) -> bool:
        return not self.jobs and (self.stopping or self._is_last())

    def _is_last(self) -> bool:
        """Return whether no task is left to be started."""
        return self.source.is_done and not self.waiting and self.held is None

    # workers and tasks

    def _fill(self) -> None:
        """Give tasks to free slots, close workers that are not needed, and start those that are missing."""
        if self.stopping:
            return
        while len(self.jobs) < self.max_concurrent and (seat_job := self._next()):
            seat, job = seat_job
            seat.jobs[job.task.name] = job
            seat.worker.start(job.task)
        for seat in list(self.seats):
            if not seat.jobs and (seat.retired or self._is_last()):
                self.seats.remove(seat)
                seat.worker.close()
        wanted = self.num_workers
        if self.source.is_done:  # workers only for what is still to be started
            busy = sum(1 for seat in self.seats if seat.jobs)
            wanted = min(wanted, busy + len(self.waiting) + (self.held is not None))
        while len(self.seats) < wanted:
            self.seats.append(Seat(self.make_worker(), slots=self.slots))

    def _next(self) -> tuple[Seat, Job] | None:
        """Return the next task to start, and the worker for it; None if there is no free slot or no task."""
        for job in self.waiting:
            if seat := self._seat_for(job):
                self.waiting.remove(job)
                return seat, job
        if self.held is None and self._seat_for(self._job(_ANY)) is not None:
            self.held = self.source.next_task()
        if self.held is None or (seat := self._seat_for(self._job(self.held))) is None:
            return None
        job, self.held = self._job(self.held), None
        return seat, job

    def _job(self, task: Task) -> Job:
        return Job(task, FailureBudget(self.max_failures))

    def _seat_for(self, job: Job) -> Seat | None:
        """Return the worker with the fewest tasks that accepts the job; one is kept free for a job that runs alone."""
        seats = sorted((seat for seat in self.seats if seat.ready), key=lambda seat: len(seat.jobs))
        if any(other.alone for other in self.waiting) and not job.alone:
            seats = seats[1:]
        return next((seat for seat in seats if seat.accepts(job)), None)

    # events

    def _receive(self) -> None:
        """Wait for an event, and handle all that have arrived."""
        try:
            worker, event = self.events.get(timeout=SECONDS_BETWEEN_QUESTIONS)
            while True:
                seat = next((seat for seat in self.seats if seat.worker is worker), None)
                if seat is not None:  # else the worker was closed
                    self._handle(seat, event)
                worker, event = self.events.get_nowait()
        except queue.Empty:
            return

    def _handle(self, seat: Seat, event: Event) -> None:
        match event:
            case Ready(slots):
                seat.ready, self.failed_starts = True, 0
                seat.slots = min(seat.slots, slots or seat.slots)
            case Started(name):
                seat.jobs[name].started = True
                self.source.on_start(seat.jobs[name].task)
            case Round(name, figures):
                seat.jobs[name].rounds.append(figures)
            case Ended(name, end, reusable):
                seat.retired = seat.retired or not reusable
                self._end(seat.jobs.pop(name), end)
            case Died(reason, preempted):
                self.seats.remove(seat)
                seat.worker.close()
                self._bury(seat, reason, preempted)

    def _end(self, job: Job, end: End) -> None:
        if job.asked:
            self.source.decision(job.task)
        while job.rounds:
            self._pass_on(job)
        self.source.on_end(job.task, end)

    def _pass_on(self, job: Job) -> None:
        figures = job.rounds.popleft()
        job.task = dataclasses.replace(job.task, last_step=figures["step"])
        self.source.on_round(job.task, figures)

    def _decide(self) -> None:
        """Pass rounds to the source, and its decisions to the workers."""
        for seat in self.seats:
            for name, job in seat.jobs.items():
                while job.asked or job.rounds:
                    if job.stopped:  # decided before its worker died
                        job.rounds.clear()
                        seat.worker.answer(name, True)
                        break
                    if not job.asked:
                        self._pass_on(job)
                        job.asked = True
                    decision = self.source.decision(job.task)
                    if decision is None:
                        break
                    job.asked, job.stopped = False, decision
                    seat.worker.answer(name, decision)

    def _bury(self, seat: Seat, reason: str, preempted: bool) -> None:
        """Give the tasks of a dead worker out again, or end them."""
        if not seat.ready and not preempted:
            self.failed_starts += 1
            if self.failed_starts > FAILED_STARTS:
                raise RunFailed(f"{self.failed_starts} workers could not be started, the last one: {reason}")
        for job in seat.jobs.values():
            if job.asked or job.rounds:
                while job.rounds:
                    self._pass_on(job)
                job.stopped, job.asked = bool(self.source.decision(job.task)), False
            if self.stopping:
                self._end(job, End("interrupted"))
                continue
            then: After = "again"
            if job.started:
                job.deaths += not preempted
                saved = self.newest_checkpoint(job.task)
                then = after_death(job.budget, job.deaths, saved=saved, preempted=preempted)
            if then == "failed":
                self._end(job, End("failed", error=f"its process died: {reason}", kind="RunFailed"))
                continue
            log.warning("%s: its process died (%s); it is started again", job.task.name, reason)
            job.alone, job.started = then == "alone", False
            self.waiting.append(job)

    def _stop(self) -> None:
        """Have the running tasks save a checkpoint, and end those that wait."""
        self.stopping = True
        for job in self.waiting:
            self._end(job, End("interrupted"))
        if self.held is not None:
            self.source.on_end(self.held, End("interrupted"))
        self.waiting, self.held = [], None
        for seat in list(self.seats):
            if seat.jobs:
                seat.worker.stop()
            else:
                self.seats.remove(seat)
                seat.worker.close()


_ANY = Task("", {})
