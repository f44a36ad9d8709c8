"""How fast a run trains and how long it still takes, smoothed over many steps."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

WINDOW_SECONDS = 30.0  # of training, which the shown rate covers
SETTLED_SECONDS = 60.0  # after which what saves and previews take is known well enough to be counted


class _Piece(NamedTuple):
    steps: int
    seconds: float
    images: float


class Pace:
    """The speed of the last WINDOW_SECONDS of training, from the logged lines, which leave out saves and previews."""

    def __init__(self) -> None:
        self._pieces: deque[_Piece] = deque()
        self._step: int | None = None
        self._warms_up = True  # the steps of the first line are slower than any later ones
        self._began, self._trained = 0.0, 0.0

    def add(self, line: dict[str, Any], *, now: float) -> None:
        """Take in a line of metrics; ``now`` is when it was seen, in seconds of any clock that runs evenly."""
        step, seconds = int(line["step"]), line.get("step_seconds")
        if self._step is not None and step <= self._step:  # the run was started again from a checkpoint
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
        """Images a second of training; None before the first line."""
        seconds = self._seconds()
        return sum(piece.images for piece in self._pieces) / seconds if seconds else None

    def seconds_left(self, steps: int, *, now: float) -> float | None:
        """Return how long so many more steps take; None before the second line."""
        if self._warms_up:
            return None
        passed = now - self._began
        # What saves and previews were seen to take, they go on taking.
        slower = max(1.0, passed / self._trained) if passed >= SETTLED_SECONDS else 1.0
        return slower * steps * self._seconds() / sum(piece.steps for piece in self._pieces)

    def _seconds(self) -> float:
        return sum(piece.seconds for piece in self._pieces)
