"""How long a run takes: durations measured within a process, never differences of two machines' clocks."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Clock:
    """Times a run's start-up and training in seconds, those of the sessions before a resume included.

    ``waited`` is what passed before this process had its turn, as whoever started it measured it.
    """

    def __init__(self, waited: float = 0.0):
        self.start_up, self.train = waited, 0.0
        self._since, self._is_ready = time.monotonic(), False

    def resume(self, before: Mapping[str, float]) -> None:
        """Add the seconds that a checkpoint holds."""
        self.start_up += before.get("start_up", 0.0)
        self.train += before.get("train", 0.0)

    def ready(self) -> None:
        """Note that the start-up is over and training begins."""
        self.lap()
        self._is_ready = True

    def lap(self) -> dict[str, float]:
        """Return the seconds of each phase until now."""
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
