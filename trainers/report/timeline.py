"""Computes from the events of a run where its time went: steps that counted, saves, start-up, and failures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

Event = dict[str, Any]
#: parts of a run's time, with their titles in the report
PARTS = {
    "train": "steps that counted",
    "save": "saves, in the loop",
    "evaluation": "validation and previews",
    "start_up": "start-up",
    "lost": "lost to failures",
    "other": "export and other",
}
MOST_POINTS = 500  # of steps and saves in summary.json


@dataclass(frozen=True)
class Span:
    """A part of the time, from ``begin`` to ``end`` in seconds since the start."""

    part: str
    begin: float
    end: float


@dataclass
class Incident:
    """A failure, preemption or hang, after which the run went on or ended; ``at`` in seconds since the start.

    ``step``: the last finished step then; ``steps_repeated``: those between the checkpoint and it; ``seconds_lost``:
    without progress, and of the steps that were repeated.
    """

    at: float
    cause: str
    step: int | None = None
    rank: int | None = None
    node: str | None = None
    error: str = ""
    steps_repeated: int = 0
    seconds_lost: float = 0.0


@dataclass
class Timeline:
    """What happened when; times in seconds since the start, without the pauses between an end and a resume.

    ``steps``: (time, finished steps); a fall is a return to a checkpoint. ``saves``: (time, step, seconds in the loop).
    """

    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    steps: list[tuple[float, int]] = field(default_factory=list)
    saves: list[tuple[float, int, float]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)

    @property
    def effective(self) -> float | None:
        """Effective training time: the time of steps that counted over the time since the start."""
        return min(1.0, self.parts["train"] / self.seconds) if self.seconds > 0 else None

    @property
    def steps_repeated(self) -> int:
        """Steps that were taken again after a failure."""
        return sum(one.steps_repeated for one in self.incidents)

    def summary(self) -> dict[str, Any]:
        """Return the timeline as plain data for ``summary.json``."""
        return {
            "effective_training_time": self.effective,
            "wall_seconds": self.seconds,
            "seconds": self.parts,
            "steps_repeated": self.steps_repeated,
            "incidents": [asdict(one) for one in self.incidents],
            "steps": _thinned(self.steps),
            "saves": _thinned(self.saves),
        }


def read_timeline(events: Iterable[Event]) -> Timeline | None:
    """Return the timeline of a run's events, as ``read_events`` returns them; None without the start of a run."""
    known = [event for event in events if _time(event) is not None]
    if not any(event["kind"] == "start" for event in known):
        return None
    reader = _Reader()
    for event in known:
        reader.see(event)
    return reader.finish(known)


class _Reader:
    """The state between two events. Times are those of :class:`Timeline`, except in ``_time``."""

    def __init__(self) -> None:
        self.line = Timeline()
        self.zero: float | None = None  # the time of the start, later by each pause
        self.ended: float | None = None  # when the run ended: until the next start it pauses
        self.active: float = 0.0  # the last sign of progress
        self.starting: str | None = None  # the part to which the time until `ready` belongs
        self.reached = 0
        self.open: list[Incident] = []  # failures since the last progress
        self.chunks: list[tuple[int, int, float]] = []  # first step, last step, seconds, in order

    def see(self, event: Event) -> None:
        time = _time(event) or 0.0
        kind, step, seconds = event["kind"], event.get("step"), float(event.get("seconds") or 0.0)
        if kind == "start":
            self._start(time, int(step or 0), seconds)
        if self.zero is None:
            self.zero = time
        now = time - self.zero
        if kind == "ready":
            self._progress(now, self.starting or "start_up")
            self._close(now, int(step or 0))
            self.line.steps.append((now, int(step or 0)))
        elif kind == "steps" and step is not None:
            self.chunks.append((step - int(event.get("count") or 0), step, seconds))
            self.line.steps.append((now, step))
            self.reached, self.active = step, now
        elif kind == "save" and step is not None:
            self.line.saves.append((now, step, seconds))
            self._spend("save", now, seconds)
        elif kind == "evaluation":
            inside = sum(spent for at, _, spent in self.line.saves if now - seconds < at <= now)
            self._spend("evaluation", now, max(0.0, seconds - inside))
        elif kind == "regroup":
            self._spend("lost", now, seconds)
            if not self.open:
                self.open.append(Incident(now, str(event.get("cause", "regroup")), step))
            self.open[0].seconds_lost += seconds
            self._close(now, None)
        elif kind == "failure":
            self._fail(now, event)
        elif kind == "end":
            self.ended, self.active = time, now

    def finish(self, events: Sequence[Event]) -> Timeline:
        line = self.line
        last = max(_time(event) or 0.0 for event in events)
        line.seconds = max(0.0, (self.ended if self.ended is not None else last) - (self.zero or 0.0))
        if self.starting is not None:  # it never became ready
            self._progress(line.seconds, self.starting)
        self._close(line.seconds, None)
        # A step counts in its last execution: from the end, what lies above the begin of a later chunk was repeated.
        lowest = float("inf")
        for first, end, seconds in reversed(self.chunks):
            share = max(0.0, min(end, lowest) - first) / (end - first) if end > first else 0.0
            line.parts["train"] += seconds * share
            line.parts["lost"] += seconds * (1 - share)
            lowest = min(lowest, first)
        known = sum(seconds for part, seconds in line.parts.items() if part != "other")
        line.parts["other"] = max(0.0, line.seconds - known)
        return line

    def _start(self, time: float, step: int, waited: float) -> None:
        if self.zero is None:
            self.zero = time - waited
        elif self.ended is not None:  # a resume by the user: the pause before it does not count
            self.zero += max(0.0, time - waited - self.ended)
        else:
            if not self.open:
                self.open.append(Incident(self.active, "driver or controller lost", self.reached))
            self.starting = "lost"
        if self.ended is not None or self.starting is None:
            self.starting = "start_up"
            self.active = max(self.active, time - waited - self.zero)
        self.ended = None
        self.chunks.append((step, step, 0.0))  # what was done above this step is repeated

    def _fail(self, now: float, event: Event) -> None:
        if not self.open:
            step, cause, error = (
                event.get("step"),
                str(event.get("cause", "failure")),
                str(event.get("error", "")),
            )
            step = self.reached if step is None else int(step)
            self.open.append(Incident(now, cause, step, event.get("rank"), event.get("node"), error))
        if event.get("action") == "end" or event.get("cause") == "mistake":
            self.ended = now + (self.zero or 0.0)
            self._close(now, None)

    def _progress(self, now: float, part: str) -> None:
        """Count the time since the last progress as ``part``."""
        lost = max(0.0, now - self.active)
        self.line.parts[part] += lost
        if lost:
            self.line.spans.append(Span(part, self.active, now))
        if part == "lost" and self.open:
            self.open[0].seconds_lost += lost
        self.active, self.starting = now, None

    def _close(self, now: float, step: int | None) -> None:
        """Complete the open incident, after which the run goes on from ``step`` (None: without repeating any)."""
        for incident in self.open[:1]:
            if step is not None and incident.step is not None:
                incident.steps_repeated = max(0, incident.step - step)
                incident.seconds_lost += self._seconds_above(step)
            self.line.incidents.append(incident)
        self.open = []
        self.active = max(self.active, now)

    def _seconds_above(self, step: int) -> float:
        """Return the time of the reported steps above ``step`` of the attempt before."""
        total = 0.0
        marks = 0
        for first, end, seconds in reversed(self.chunks):
            if end == first:  # the start of an attempt
                marks += 1
                if marks == 2:
                    break
            elif end > step:
                total += seconds * (end - max(first, step)) / (end - first)
        return total

    def _spend(self, part: str, now: float, seconds: float) -> None:
        self.line.parts[part] += seconds
        self.line.spans.append(Span(part, max(0.0, now - seconds), now))
        self.active = now


def _time(event: Event) -> float | None:
    try:
        return datetime.fromisoformat(event["at"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return None


def _thinned(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    every = -(-len(rows) // MOST_POINTS) or 1
    return [list(row) for row in (*rows[:-1:every], *rows[-1:])]
