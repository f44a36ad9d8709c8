"""The progress of the run in this process, which the loop marks and other threads read."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

RECENT_STEPS = 100
SECONDS_BETWEEN_REPORTS = 10.0
#: phases: before the first step is done, a pass over a batch of a new shape (which may compile), any other step, and
#: after the last one
START, NEW_SHAPE, STEP, END = "start", "new shape", "step", "end"
#: stages of a step in which a worker may wait for the others
WAITING_STAGES = frozenset({"last pass", "reduce"})


@dataclass(frozen=True)
class Beat:
    """A copy of a :class:`Pulse` at one moment.

    ``step``: finished steps; ``seconds``: since the last progress; ``slowest``: the slowest of the last RECENT_STEPS
    steps in seconds, None before the second; ``saved``: step of the newest checkpoint that this process knows.
    """

    step: int
    phase: str
    stage: str
    seconds: float
    slowest: float | None = None
    saved: int | None = None


@dataclass(frozen=True)
class Notice:
    """The announcement that this worker's place will be taken away, ``seconds`` after ``since`` (monotonic clock)."""

    reason: str
    since: float
    seconds: float | None = None

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end of the grace period; None if that is unknown."""
        return None if self.seconds is None else self.seconds - (time.monotonic() - self.since)


class Preempted(Exception):
    """Ends a worker that was given notice, after it saved a checkpoint: the run continues on other machines."""


class Pulse:
    """Step and phase of a run in this process; ``notice`` is set if the process is to leave.

    ``on_steps(step, count, seconds)`` is called before each phase and at least every SECONDS_BETWEEN_REPORTS with the
    steps since the last call and the time that they took; ``on_phase(phase, step, seconds)`` after each phase;
    ``on_stage(stage, step)`` at each mark.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.step, self.phase, self.stage = 0, START, ""
        self.saved: int | None = None
        self.notice: Notice | None = None
        self.on_steps: Callable[[int, int, float], None] = lambda step, count, seconds: None
        self.on_phase: Callable[[str, int, float], None] = lambda phase, step, seconds: None
        self.on_stage: Callable[[str, int], None] = lambda stage, step: None
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._shapes: set[Any] = set()
        self._count, self._seconds, self._first = 0, 0.0, True
        self._progress = self._since = self._reported = clock()

    def resume(self, step: int) -> None:
        """Set the number of finished steps at the start of the loop, from the checkpoint of that step, if not 0."""
        self.step, self.saved, self.phase, self._first = step, step or None, START, True
        self._progress = self._since = self._reported = self.clock()

    def mark(self, stage: str) -> None:
        """Note that the step has reached ``stage``."""
        self.stage, self._progress = stage, self.clock()
        self.on_stage(stage, self.step)

    def begin_pass(self, batch: Mapping[str, Any], *, last: bool) -> None:
        """Note the begin of a forward and backward pass."""
        shape = tuple(sorted((key, tuple(v.shape)) for key, v in batch.items() if hasattr(v, "shape")))
        if shape not in self._shapes:
            self._shapes.add(shape)
            self.phase = START if self._first else NEW_SHAPE
        self.mark("last pass" if last else "pass")

    def finish_step(self, step: int) -> None:
        """Note that ``step`` steps are finished."""
        now = self.clock()
        took, self._since = now - self._since, now
        if self.phase == STEP:
            self._steps.append(took)
        self._count, self._seconds = self._count + 1, self._seconds + took
        self.step, self.phase, self._first = step, STEP, False
        self.mark("")
        if now - self._reported >= SECONDS_BETWEEN_REPORTS:
            self.report()

    def end(self) -> None:
        """Note that the loop is over: what follows, such as an export, may take any time."""
        self.phase = END
        self.mark("")

    def report(self) -> None:
        """Pass the steps since the last report to ``on_steps``."""
        count, seconds = self._count, self._seconds
        self._count, self._seconds, self._reported = 0, 0.0, self.clock()
        if count:
            self.on_steps(self.step, count, seconds)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Be in ``phase``, such as a save, within this context; its time does not count as that of a step."""
        self.report()
        before, began = self.phase, self.clock()
        self.phase = phase
        self.mark("")
        try:
            yield
        finally:
            now = self.clock()
            self.phase, self._since = before, self._since + now - began
            self.mark("")
        self.on_phase(phase, self.step, now - began)

    def beat(self) -> Beat:
        """Return a copy of the progress."""
        slowest = max(self._steps, default=None)
        return Beat(self.step, self.phase, self.stage, self.clock() - self._progress, slowest, self.saved)


_current: list[Pulse] = []


@contextmanager
def training_here(pulse: Pulse) -> Iterator[Pulse]:
    """Make ``pulse`` the one of this process, which :func:`current` returns, within this context."""
    _current[:] = [pulse]
    try:
        yield pulse
    finally:
        _current.clear()


def current() -> Pulse | None:
    """Return the pulse of the run that trains in this process; None if none does."""
    return _current[0] if _current else None
