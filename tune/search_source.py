"""The task source of a search: trials that the algorithm proposes and the scheduler stops, recorded in the store."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dreamfleet.datasets import errors
from dreamfleet.datasets.errors import RecipeError, UserError
from dreamfleet.trainers.packing.task import End, Task
from dreamfleet.tune.algorithm import SearchAlgorithm
from dreamfleet.tune.asha import Scheduler
from dreamfleet.tune.pool.room import Room
from dreamfleet.tune.retention import Retention
from dreamfleet.tune.trial_store import Trial, TrialStore, common_error, trial_recipe


class SearchSource:
    """Supplies the trials of a search as tasks, and records their rounds and ends.

    ``workers``: the processes of a trial, 0 if it shares its process with others. ``on_progress`` is called with every
    trial that changed. If the first trials fail with an error that every trial would raise, ``error`` is set, and the
    search must end.
    """

    def __init__(
        self,
        store: TrialStore,
        algorithm: SearchAlgorithm,
        scheduler: Scheduler,
        *,
        on_progress: Callable[[Trial], None],
        workers: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.store, self.algorithm, self.scheduler = store, algorithm, scheduler
        self.on_progress, self.workers = on_progress, workers
        self.retention = Retention(store)
        self.error: UserError | None = None
        self.times = TrialTimes(clock)
        self._is_done = False
        self._decisions: dict[str, bool] = {}

    @property
    def is_done(self) -> bool:
        """Whether the search proposes no more trials."""
        return self._is_done or self.error is not None

    def next_task(self) -> Task | None:
        """Return the next trial; record those whose values make the recipe invalid as failed."""
        while not self.is_done:
            trial = self.algorithm.suggest()
            if trial is None:
                self._is_done = True
                return None
            try:
                recipe = trial_recipe(
                    self.store.recipe,
                    trial.point,
                    self.store.folder.path(trial.folder),
                    workers=self.workers,
                )
            except RecipeError as error:
                self._fail(trial, str(error), type(error).__name__)
                continue
            last_step = trial.rounds[-1]["step"] if trial.rounds else -1
            return Task(trial.name, recipe.model_dump(mode="json"), tuple(self.store.figures), last_step)
        return None

    def on_start(self, task: Task) -> None:
        """Record the start or restart of a trial."""
        trial = self.store.trial(task.name)
        self.times.start(trial)
        self.store.start(trial)
        self.on_progress(trial)

    def on_round(self, task: Task, figures: dict[str, Any]) -> None:
        """Record a validation round, and have the scheduler decide."""
        trial = self.store.trial(task.name)
        self.times.update()
        self._decisions[task.name] = self.scheduler.stops(task.name, figures)
        self.store.record(trial, figures)
        self.on_progress(trial)

    def decision(self, task: Task) -> bool:
        """Return the scheduler's decision after the last round."""
        return self._decisions[task.name]

    def on_end(self, task: Task, end: End) -> None:
        """Record the end of a trial, and remove what is not kept of it."""
        trial = self.store.trial(task.name)
        self.times.end(trial)
        if end.exit_reason == "failed":
            self._fail(trial, str(end.error), end.kind)
            return
        self.store.end(trial, end.exit_reason)
        if trial.is_over:
            self.retention.after_end(trial)
        self.on_progress(trial)

    def _fail(self, trial: Trial, error: str, kind: str | None) -> None:
        known = kind if kind and hasattr(errors, kind) else "RunFailed"
        self.store.end(trial, "failed", error=error, kind=known)
        self.retention.after_end(trial)
        planned = self.algorithm.total
        if self.error is None:
            self.error = common_error(
                self.store.trials, len(self.store.trials) if planned is None else planned
            )
        self.on_progress(trial)


class TrialTimes:
    """Adds the time that trials run to their seconds, and their share of the pool's GPUs to their GPU seconds."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.room: Room | None = None
        self._running: dict[str, Trial] = {}
        self._last = clock()

    def set_room(self, room: Room) -> None:
        """Set the size of the pool, from which on GPU time counts."""
        self.room = room

    def start(self, trial: Trial) -> None:
        """Count from now on for a trial."""
        self.update()
        self._running[trial.name] = trial

    def end(self, trial: Trial) -> None:
        """Count until now for a trial."""
        self.update()
        self._running.pop(trial.name, None)

    def update(self) -> None:
        """Add the time since the last call to the running trials."""
        now = self.clock()
        passed, self._last = now - self._last, now
        for trial in self._running.values():
            trial.seconds += passed
            trial.gpu_seconds += passed * self._gpus_of_each()

    def _gpus_of_each(self) -> float:
        if self.room is None:
            return 0.0
        return self.room.gpus * min(1.0, self.room.groups / len(self._running))
