"""The task source inside a worker's process: passes tasks in and events out, between the runner and the driver."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from dreamfleet.trainers.packing.task import End, Task
from dreamfleet.tune.pool.worker import Ended, Event, Round, Started

IDLE_SECONDS = 0.5  # how long `next_task` waits for a task while none is running
UNDECIDED_SECONDS = 0.05  # how long `decision` waits while all tasks wait for theirs


class RemoteSource:
    """A TaskSource whose tasks and decisions come from another process, by methods that any thread may call.

    ``emit`` receives the events. ``is_reusable``: whether the process can run another task after one that ended.
    """

    def __init__(self, emit: Callable[[Event], None], is_reusable: Callable[[Task, End], bool]):
        self.emit, self.is_reusable = emit, is_reusable
        self._changed = threading.Condition()
        self._inbox: deque[Task] = deque()
        self._running: set[str] = set()
        self._undecided: set[str] = set()
        self._answers: dict[str, bool] = {}
        self._closed = False

    # from the driver

    def give(self, task: Task) -> None:
        """Add a task; it ends as interrupted if the source was closed."""
        with self._changed:
            if not self._closed:
                self._inbox.append(task)
                self._changed.notify_all()
                return
        self.emit(Ended(task.name, End("interrupted")))

    def answer(self, name: str, stop: bool) -> None:
        """Continue or stop a task after its last round."""
        with self._changed:
            self._answers[name] = stop
            self._changed.notify_all()

    def close(self) -> None:
        """Give out no more tasks; those that were not started end as interrupted."""
        with self._changed:
            self._closed = True
            left = list(self._inbox)
            self._inbox.clear()
            self._changed.notify_all()
        for task in left:
            self.emit(Ended(task.name, End("interrupted")))

    # from the runner

    def next_task(self) -> Task | None:
        """Return the next task; wait for one if none is running."""
        with self._changed:
            if not self._inbox and not self._running and not self._closed:
                self._changed.wait(IDLE_SECONDS)
            if not self._inbox:
                return None
            task = self._inbox.popleft()
            self._running.add(task.name)
            return task

    @property
    def is_done(self) -> bool:
        """Whether the source was closed."""
        return self._closed

    def on_start(self, task: Task) -> None:
        """Tell the driver that a task was started."""
        self.emit(Started(task.name))

    def on_round(self, task: Task, figures: dict[str, Any]) -> None:
        """Send a round to the driver."""
        with self._changed:
            self._undecided.add(task.name)
        self.emit(Round(task.name, figures))

    def decision(self, task: Task) -> bool | None:
        """Return the driver's answer; wait for it while every running task waits for one."""
        with self._changed:
            if task.name not in self._answers and self._undecided >= self._running:
                self._changed.wait(UNDECIDED_SECONDS)
            answer = self._answers.pop(task.name, None)
            if answer is not None:
                self._undecided.discard(task.name)
            return answer

    def on_end(self, task: Task, end: End) -> None:
        """Tell the driver that a task ended."""
        with self._changed:
            self._running.discard(task.name)
            self._undecided.discard(task.name)
            self._answers.pop(task.name, None)
        self.emit(Ended(task.name, end, self.is_reusable(task, end)))
