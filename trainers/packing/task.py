"""The trainings that share a process or a cluster: tasks, the source that supplies them, and how each one ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

ExitReason = Literal["completed", "interrupted", "stopped", "failed"]


@dataclass(frozen=True)
class Task:
    """One training: an ordinary run of ``recipe`` (a plain tree) in the recipe's ``output_dir``.

    ``figures``: keys of a validation round; with them, the training waits after each round until its source has
    decided whether it continues. ``last_step``: the step of the last round that was reported before an interruption;
    -1 for none.
    """

    name: str
    recipe: dict[str, Any]
    figures: tuple[str, ...] = ()
    last_step: int = -1


@dataclass(frozen=True)
class End:
    """How a task ended: the run's summary as plain data, or the error and the name of its class.

    ``stopped``: its source ended it after a validation round. ``interrupted``: it saved a checkpoint, and a resume
    continues it. ``seconds``: the time since it was started; of a packed task, the time that it shared with others.
    """

    exit_reason: ExitReason
    summary: dict[str, Any] | None = None
    error: str | None = None
    kind: str | None = None
    seconds: float = 0.0


class TaskSource(Protocol):
    """Supplies the tasks of a search or a fleet, and receives their results. All calls come from one thread."""

    def next_task(self) -> Task | None:
        """Return the next task to start; None if there is none now."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether no task will follow, so that the runner ends after the running ones."""
        ...

    def on_start(self, task: Task) -> None:
        """Record that a task was started, or started again on another machine."""
        ...

    def on_round(self, task: Task, figures: dict[str, Any]) -> None:
        """Receive a validation round: ``step`` and the measured figures. :meth:`decision` is asked until it answers."""
        ...

    def decision(self, task: Task) -> bool | None:
        """Return whether the task is stopped after its last round; None while that is undecided."""
        ...

    def on_end(self, task: Task, end: End) -> None:
        """Record the end of a task."""
        ...
