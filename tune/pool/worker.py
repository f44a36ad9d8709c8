"""A worker of a pool, as its driver sees it, and the events that it sends to the driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from dreamfleet.trainers.packing.task import End, Task


class Worker(Protocol):
    """Runs tasks and puts events into the queue that it was made with. Its methods return at once."""

    def start(self, task: Task) -> None:
        """Start a task, or continue it from its newest checkpoint."""
        ...

    def answer(self, name: str, stop: bool) -> None:
        """Continue or stop the task called ``name`` after a round."""
        ...

    def stop(self) -> None:
        """Have all tasks save a checkpoint and end."""
        ...

    def close(self) -> None:
        """Release the resources of a worker without tasks, or end it without a checkpoint. It sends no more events."""
        ...


@dataclass(frozen=True)
class Ready:
    """The worker can run tasks, ``slots`` at once if that is fewer than the driver planned."""

    slots: int | None = None


@dataclass(frozen=True)
class Started:
    """A task was started."""

    name: str


@dataclass(frozen=True)
class Round:
    """A task measured ``figures`` in a validation round, and waits for an answer."""

    name: str
    figures: dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """A task ended. ``reusable``: whether the worker's process can run another one."""

    name: str
    end: End
    reusable: bool = True


@dataclass(frozen=True)
class Died:
    """The worker's process died. ``preempted``: its machine was taken away, which is no failure of its tasks."""

    reason: str
    preempted: bool = False


Event = Ready | Started | Round | Ended | Died
