"""The state of each subject of a fleet, kept in a byte, and the lines about the whole on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from dreamfleet.tune.fleet.rows import Status

STATES: tuple[Status, ...] = get_args(Status)
WAITING, RUNNING, INTERRUPTED, FAILED, COMPLETED = range(len(STATES))

SECONDS_BETWEEN_LINES = 10.0
MAX_REASONS = 20  # failures that are printed one by one


class States:
    """The state of each subject by its index, and how many there are of each."""

    def __init__(self, count: int):
        self._states = bytearray(count)
        self._counts = [count, *[0] * (len(STATES) - 1)]

    def __getitem__(self, index: int) -> int:
        return self._states[index]

    def __setitem__(self, index: int, state: int) -> None:
        self._counts[self._states[index]] -= 1
        self._counts[state] += 1
        self._states[index] = state

    def __len__(self) -> int:
        return len(self._states)

    def count(self, state: int) -> int:
        """Return the number of subjects in a state."""
        return self._counts[state]


@dataclass
class Progress:
    """Says how a fleet proceeds: a line every ten seconds, and one for each of the first failures."""

    states: States
    say: Callable[[str], None]
    ended: int = 0  # subjects that were completed or failed in this command
    _started: float = 0.0
    _last: float = 0.0
    _reasons: int = 0

    def __post_init__(self) -> None:
        self._started = self._last = time.monotonic()

    def end(self, name: str, state: int, reason: str | None) -> None:
        """Count a subject that ended in a state; ``reason``: why it failed."""
        self.ended += state != INTERRUPTED
        if state == FAILED:
            self._reasons += 1
            if self._reasons <= MAX_REASONS:
                self.say(f"{name} failed: {reason}")
            elif self._reasons == MAX_REASONS + 1:
                self.say("further failures are only listed in fleet.parquet and index.html")
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self.show()

    def show(self) -> None:
        """Say the line, such as ``12/32 done, 1 failed, 4 running, 40 subjects/hour``."""
        self._last = time.monotonic()
        states = self.states
        parts = [f"{states.count(COMPLETED)}/{len(states)} done"]
        parts += [
            f"{count} {STATES[state]}"
            for state in (FAILED, INTERRUPTED, RUNNING)
            if (count := states.count(state))
        ]
        if self.ended:
            parts.append(f"{3600 * self.ended / max(1e-3, self._last - self._started):,.0f} subjects/hour")
        self.say(", ".join(parts))
