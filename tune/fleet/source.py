"""Supplies the subjects of a fleet as tasks, by priority, within the limits, and one first for each class."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable
from typing import Any

from dreamfleet.trainers.config.fleet import FleetConfig
from dreamfleet.trainers.packing.task import End, Task
from dreamfleet.tune.fleet.class_images import ClassLeaders, share_class_images
from dreamfleet.tune.fleet.finisher import Finisher, state_of
from dreamfleet.tune.fleet.progress import RUNNING, Progress, States
from dreamfleet.tune.fleet.subjects import SubjectRecipes, Subjects


class FleetSource:
    """The waiting subjects of a fleet; ``waiting``: their indices in the order in which they start."""

    def __init__(
        self,
        subjects: Subjects,
        recipes: SubjectRecipes,
        waiting: Iterable[int],
        *,
        states: States,
        finisher: Finisher,
        progress: Progress,
        limits: FleetConfig,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.subjects, self.recipes, self.states = subjects, recipes, states
        self.finisher, self.progress, self.limits = finisher, progress, limits
        self._folder = recipes.base.output_dir.rstrip("/")
        self._places = dict(enumerate(waiting))  # place in the order -> index
        self._heap = list(self._places)  # sorted, hence a heap
        self._blocked: dict[str, list[int]] = {}  # class -> places of subjects that wait for its images
        self._running: dict[str, tuple[int, str | None, int]] = {}  # name -> index, class, resolution
        self._classes = ClassLeaders(clock=clock)
        self._clock, self._began, self._started = clock, clock(), 0

    @property
    def is_out_of_time(self) -> bool:
        """Whether the hours of ``fleet.max_hours`` are used up."""
        hours = self.limits.max_hours
        return hours is not None and self._clock() - self._began >= 3600 * hours

    @property
    def is_at_limit(self) -> bool:
        """Whether a limit keeps waiting subjects from starting."""
        most = self.limits.max_subjects
        return self.is_out_of_time or (most is not None and self._started >= most)

    @property
    def is_done(self) -> bool:
        """Whether no subject will be started."""
        return self.is_at_limit or not (self._heap or self._blocked)

    def next_task(self) -> Task | None:
        """Return the next subject; None while the limits or the class images of all that wait forbid it."""
        for name in self._classes.look() if self._blocked else ():
            self._release(name)
        while self._heap and not self.is_at_limit:
            place = heapq.heappop(self._heap)
            subject = self.subjects[self._places[place]]
            tree = self.recipes.task_tree(subject)
            kind = share_class_images(tree, self._folder)
            if kind is not None and not self._classes.may_start(kind):
                self._blocked.setdefault(kind, []).append(place)
                continue
            if kind is not None:
                self._classes.start(kind, tree["output_dir"])
            self._running[subject.name] = (self._places.pop(place), kind, tree["data"]["resolution"])
            self._started += 1
            return Task(subject.name, tree)
        return None

    def on_start(self, task: Task) -> None:
        """Note that a subject is running."""
        index = self._running[task.name][0]
        self.states[index] = RUNNING
        self.finisher.touch(index)

    def on_round(self, task: Task, figures: dict[str, Any]) -> None:
        """Do nothing: a subject is not compared with others."""

    def decision(self, task: Task) -> bool:
        """Return False: a subject runs to its end."""
        return False

    def on_end(self, task: Task, end: End) -> None:
        """Note the end of a subject and hand it to the finisher."""
        index, kind, resolution = self._running.pop(task.name)
        self.states[index] = state_of(end)
        if kind is not None and self._classes.end(
            kind, task.recipe["output_dir"], completed=end.exit_reason == "completed"
        ):
            self._release(kind)
        self.finisher.end(index, end, resolution=resolution)
        self.progress.end(task.name, self.states[index], end.error)

    def _release(self, name: str) -> None:
        for place in self._blocked.pop(name, ()):
            heapq.heappush(self._heap, place)
