"""A worker that is a group of processes: one task at a time, trained by Ray Train with several workers or ZeRO."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dreamfleet.datasets.errors import RunFailed, UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.launch import FitResult, fit
from dreamfleet.trainers.packing.rounds import STOPPED, NewRounds, write_end
from dreamfleet.trainers.packing.task import End, Task
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.trainers.run.run_folder import STOP_FILE
from dreamfleet.trainers.run.summary import Summary
from dreamfleet.tune.pool.dispatch import Events
from dreamfleet.tune.pool.worker import Ended, Event, Ready, Round, Started

SECONDS_BETWEEN_STOP_FILES = 1.0
log = logging.getLogger(__name__)


class Group:
    """Trains tasks by ``fit`` in threads of the driver, one at a time; a stop goes through the run folder's stop file.

    ``num_workers`` and ``resources`` (of each worker; None: Ray Train's default) replace those of the tasks. The run
    continues while its source decides about a round, so it may train some steps more than a task in an actor.
    """

    def __init__(
        self,
        events: Events,
        *,
        num_workers: int,
        resources: Mapping[str, float] | None = None,
        shared: Sequence[str] = (),
        train: Callable[..., FitResult] = fit,
    ):
        self.events, self.shared, self.train = events, shared, train
        self.scaling: dict[str, Any] = {"num_workers": num_workers}
        if resources is not None:
            self.scaling["resources_per_worker"] = dict(resources)
        self.events, self.shared, self.train = events, shared, train
        self.is_stopped = self.is_interrupted = self.closed = False
        self.thread: threading.Thread | None = None
        self._emit(Ready())

    def start(self, task: Task) -> None:
        self.is_stopped = False
        self.thread = threading.Thread(target=self._work, args=(task,), daemon=True, name=f"fit-{task.name}")
        self.thread.start()

    def answer(self, name: str, stop: bool) -> None:
        self.is_stopped = self.is_stopped or stop

    def stop(self) -> None:
        self.is_interrupted = True

    def close(self) -> None:
        self.closed = self.is_interrupted = True

    def _emit(self, event: Event) -> None:
        if not self.closed:
            self.events.put((self, event))

    def _work(self, task: Task) -> None:
        started = time.monotonic()
        self._emit(Started(task.name))
        try:
            end = self._train(task)
        except (UserError, RunFailed) as error:
            end = End("failed", error=str(error), kind=type(error).__name__)
        except Exception as error:
            log.exception("%s failed", task.name)
            end = End("failed", error=f"{type(error).__name__}: {error}", kind="RunFailed")
        self._emit(Ended(task.name, dataclasses.replace(end, seconds=time.monotonic() - started)))

    def _train(self, task: Task) -> End:
        recipe = self._recipe(task)
        run = Storage(recipe.output_dir)
        rounds = NewRounds(run, task.figures, last_step=task.last_step)

        def on_progress(line: dict[str, Any]) -> None:
            rounds.note(line)
            self._report(task, rounds)

        over = threading.Event()
        stopper = threading.Thread(target=self._write_stop_file, args=(run, over), daemon=True)
        stopper.start()
        try:
            summary = self.train(recipe, resume=True, shared=self.shared, on_progress=on_progress).summary
        finally:
            over.set()
            stopper.join()
            run.remove(STOP_FILE)
        rounds.has_news = True
        self._report(task, rounds)
        return self._end(run, summary)

    def _end(self, run: Storage, summary: Summary) -> End:
        if summary.exit_reason == "completed":
            return End("completed", dataclasses.asdict(summary))
        if self.is_stopped:
            return End("stopped", dataclasses.asdict(write_end(run, summary, STOPPED)))
        return End("interrupted", dataclasses.asdict(summary))

    def _recipe(self, task: Task) -> Recipe:
        scaling = {**task.recipe.get("scaling", {}), **self.scaling}
        # The pool has not reserved a place for a process that computes the rounds.
        validation = {**task.recipe.get("validation", {}), "resources": None}
        return build_recipe({**task.recipe, "scaling": scaling, "validation": validation})

    def _report(self, task: Task, rounds: NewRounds) -> None:
        for figures in rounds.take():
            self._emit(Round(task.name, figures))

    def _write_stop_file(self, run: Storage, over: threading.Event) -> None:
        """Write the stop file when a stop is wanted, and again, since ``fit`` removes it when it starts."""
        while not over.wait(SECONDS_BETWEEN_STOP_FILES):
            if self.is_stopped or self.is_interrupted:
                run.write_text(STOP_FILE, "")
