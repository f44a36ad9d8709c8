"""Durations of a run's phases, measured by one process's monotonic clock, as machines' clocks differ."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Clock:
    """Measures start-up and training of a run in seconds, including the sessions before a resume.

    ``waited``: the seconds before this process was started, measured by the process that started it.
    """

    def __init__(self, waited: float = 0.0):
        self.start_up, self.train = waited, 0.0
        self._since, self._is_ready = time.monotonic(), False

    def resume(self, before: Mapping[str, float]) -> None:
        """Add the seconds stored in a checkpoint."""
        self.start_up += before.get("start_up", 0.0)
        self.train += before.get("train", 0.0)

    def adopt(self, others: Mapping[str, float]) -> None:
        """Count as a worker does that has trained since ``others``, the seconds of its :meth:`lap`, were measured."""
        self.start_up, self.train = others["start_up"], others["train"]
        self._since, self._is_ready = time.monotonic(), True

    def ready(self) -> None:
        """End the start-up phase and begin the training phase."""
        self.lap()
        self._is_ready = True

    def lap(self) -> dict[str, float]:
        """Return the seconds of each phase until now, by ``start_up`` and ``train``."""
        now = time.monotonic()
        passed, self._since = now - self._since, now
        if self._is_ready:
            self.train += passed
        else:
            self.start_up += passed
        return {"start_up": self.start_up, "train": self.train}

    def since_lap(self) -> float:
        """Return the seconds since the last :meth:`lap`."""
        return time.monotonic() - self._since
