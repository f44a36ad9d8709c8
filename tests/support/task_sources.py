"""A task source with a list of tasks, which records every call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from dreamfleet.trainers.packing.task import End, Task


class ListSource:
    """Supplies ``tasks`` in order; ``decide`` (task, figures) answers rounds, by default with "go on"."""

    def __init__(
        self, tasks: Sequence[Task], decide: Callable[[Task, dict[str, Any]], bool | None] | None = None
    ):
        self.left = list(tasks)
        self.decide = decide or (lambda task, figures: False)
        self.starts: list[Task] = []
        self.rounds: dict[str, list[dict[str, Any]]] = {}
        self.ends: dict[str, End] = {}
        self.thread = threading.current_thread()

    def next_task(self) -> Task | None:
        self._check()
        return self.left.pop(0) if self.left else None

    @property
    def is_done(self) -> bool:
        self._check()
        return not self.left

    def on_start(self, task: Task) -> None:
        self._check()
        self.starts.append(task)

    def on_round(self, task: Task, figures: dict[str, Any]) -> None:
        self._check()
        self.rounds.setdefault(task.name, []).append(figures)

    def decision(self, task: Task) -> bool | None:
        self._check()
        return self.decide(task, self.rounds[task.name][-1])

    def on_end(self, task: Task, end: End) -> None:
        self._check()
        assert task.name not in self.ends, f"{task.name} ended twice"
        self.ends[task.name] = end

    def _check(self) -> None:
        assert threading.current_thread() is self.thread, "a source is called from one thread"
