"""Training speed and remaining time, averaged over many steps."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

WINDOW_SECONDS = 30.0  # of training over which the shown speed is averaged
SETTLED_SECONDS = 60.0  # of a run after which the remaining time includes saves and previews


class _Piece(NamedTuple):
    steps: int
    seconds: float
    images: float


class Pace:
    """Mean speed over the last WINDOW_SECONDS of training, and the remaining time, from lines of metrics.

    The lines' ``step_seconds`` exclude saves and previews.
    """

    def __init__(self) -> None:
        self._pieces: deque[_Piece] = deque()
        self._step: int | None = None
        self._warms_up = True  # the steps of the first line are slower than later ones
        self._began, self._trained = 0.0, 0.0

    def add(self, line: dict[str, Any], *, now: float) -> None:
        """Add a line of metrics, read at ``now`` (seconds of a monotonic clock)."""
        step, seconds = int(line["step"]), line.get("step_seconds")
        if self._step is not None and step <= self._step:  # restarted from a checkpoint
            self._pieces.clear()
            self._step, self._warms_up, self._trained = None, True, 0.0
        before, self._step = self._step, step
        if not seconds:
            return
        steps = 1 if before is None else step - before
        if before is None:
            self._began = now
        else:
            self._trained += steps * seconds
            if self._warms_up:
                self._pieces.clear()
            self._warms_up = False
        self._pieces.append(
            _Piece(steps, steps * seconds, steps * seconds * (line.get("images_per_second") or 0))
        )
        while self._seconds() - self._pieces[0].seconds >= WINDOW_SECONDS:
            self._pieces.popleft()

    @property
    def images_per_second(self) -> float | None:
        """Images per second of training; None before the first line."""
        seconds = self._seconds()
        return sum(piece.images for piece in self._pieces) / seconds if seconds else None

    def seconds_left(self, steps: int, *, now: float) -> float | None:
        """Return the estimated seconds that ``steps`` more steps take; None before the second line."""
        if self._warms_up:
            return None
        passed = now - self._began
        # Assumes that saves and previews continue to take the same share of the time.
        slower = max(1.0, passed / self._trained) if passed >= SETTLED_SECONDS else 1.0
        return slower * steps * self._seconds() / sum(piece.steps for piece in self._pieces)

    def _seconds(self) -> float:
        return sum(piece.seconds for piece in self._pieces)
