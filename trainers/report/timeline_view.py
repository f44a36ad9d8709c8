"""Lays out the timeline of a run for its report: parts of the time, steps over time, and what failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.report.charts import MOST_POINTS, SIDE, Mark, Plot, ticks
from dreamfleet.trainers.report.timeline import PARTS, Incident, Timeline

COLOURS = {"train": 1, "save": 3, "evaluation": 2, "start_up": 4, "lost": 0, "other": 5}
CAUSES = {
    "error": "error of the run",
    "memory": "out of memory",
    "died": "worker or node lost",
    "lost": "connection lost",
    "hung": "worker hung",
    "preempted": "preempted",
    "mistake": "ended by an error",
}
UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


@dataclass(frozen=True)
class TimelineView:
    """What the report shows: the parts as (title, colour, seconds), the plot, and the rows of the table."""

    effective: str
    seconds: float
    parts: Sequence[tuple[str, int, float]]
    plot: Plot | None
    incidents: Sequence[tuple[str, str, str, str, str, str]]


def lay_out_timeline(line: Timeline) -> TimelineView:
    """Return the timeline as text, colours and paths."""
    shown = [
        (title, COLOURS[part], line.parts[part]) for part, title in PARTS.items() if line.parts[part] > 0
    ]
    return TimelineView(
        effective=formatting.share(line.effective) if line.effective is not None else "?",
        seconds=line.seconds,
        parts=shown,
        plot=_plot(line),
        incidents=[_row(one) for one in line.incidents],
    )


def _row(one: Incident) -> tuple[str, str, str, str, str, str]:
    """Return when, what, where, step, steps repeated and time lost of an incident."""
    where = [f"worker {one.rank}" if one.rank is not None else "", f"on {one.node}" if one.node else ""]
    return (
        formatting.seconds(one.at),
        CAUSES.get(one.cause, one.cause),
        " ".join(part for part in where if part),
        formatting.number(one.step) if one.step is not None else "",
        formatting.number(one.steps_repeated),
        formatting.seconds(one.seconds_lost),
    )


def _plot(line: Timeline) -> Plot | None:
    """Return the steps over time, with the other parts as bars below and failures as vertical lines; None without."""
    if not line.steps or line.seconds <= 0:
        return None
    top = max(step for _, step in line.steps) or 1

    def across(seconds: float) -> float:
        return SIDE * min(1.0, max(0.0, seconds / line.seconds))

    marks = [
        Mark("cut c0", f"M{across(one.at):.1f} 0V{SIDE}", f"{_row(one)[1]} after step {one.step}")
        for one in line.incidents
    ]
    spans = [span for span in line.spans if span.part != "train"]
    every = -(-len(spans) // MOST_POINTS) or 1
    for span in spans[::every]:
        end = max(across(span.end), across(span.begin) + 1)
        label = f"{PARTS[span.part]}: {formatting.seconds(span.end - span.begin)}"
        marks.append(
            Mark(f"band c{COLOURS[span.part]}", f"M{across(span.begin):.1f} {SIDE}H{end:.1f}", label)
        )
    points = [(across(at), SIDE * (1 - step / top)) for at, step in line.steps]
    every = -(-len(points) // MOST_POINTS) or 1
    kept = [*points[:-1:every], points[-1]]
    marks.append(Mark("plain c1", "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in kept)))
    unit, name = next(one for one in UNITS if line.seconds >= 2 * one[0] or one[1] == "s")
    parts = {span.part for span in spans}
    return Plot(
        "Steps over time",
        "",
        legend=[("steps", 1), *((PARTS[part], COLOURS[part]) for part in PARTS if part in parts)],
        x_ticks=[
            (100 * t * unit / line.seconds, f"{formatting.number(t)} {name}")
            for t in ticks(0, line.seconds / unit)
        ],
        y_ticks=[(100 * (1 - t / top), formatting.number(t)) for t in ticks(0, top) if t == int(t)],
        marks=marks,
    )
