"""Lays out the charts of a report: lines and dots for the ``chart`` macro of the templates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from dreamfleet.datasets.json_text import json_text
from dreamfleet.trainers.report import formatting

MOST_POINTS = 500  # maximum number of points of a line; more are not visible on a screen
SIDE = 1000  # side of the square in which marks are placed
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One curve. ``kind``: "plain", "faint" (raw values behind a smoothed line) or "dots" (few measured points).

    ``colour`` is 0 to 3, or 4 for grey. Marks with the same ``key`` are highlighted together.
    """

    name: str
    points: Sequence[Point]
    kind: str = "plain"
    colour: int = 0
    key: str = ""


@dataclass(frozen=True)
class Chart:
    """A titled set of curves over the optimizer steps. ``write`` formats a value."""

    title: str
    lines: Sequence[Line]
    note: str = ""
    from_zero: bool = False
    write: Callable[[float], str] = field(default=formatting.number)


@dataclass(frozen=True)
class Mark:
    """One SVG path: its CSS classes, its coordinates (0 to 1000 on both axes), a tooltip, and what it stands for."""

    style: str
    path: str
    label: str = ""
    key: str = ""


@dataclass(frozen=True)
class Plot:
    """The layout of a chart: positions of ticks in per cent, names and colours of the legend, and the marks.

    ``values`` is JSON for the script that displays values at the pointer; None for a plot without this.
    """

    title: str
    note: str
    legend: Sequence[tuple[str, int]]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    marks: Sequence[Mark]
    values: str | None = None


def smooth(points: Sequence[Point], window: float = 0.06) -> list[Point]:
    """Return a curve's exponential moving average over about ``window`` of its length, unbiased at the start."""
    keep = 1 - 1 / max(1.0, window * len(points))
    total = weight = 0.0
    smoothed = []
    for step, value in points:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append((step, total / weight))
    return smoothed


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about ``count`` round values within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    width = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / width - 1e-9)
    return [round(k * width, 12) for k in range(first, math.floor(high / width + 1e-9) + 1)]


def dot(x: float, y: float) -> str:
    """Return the SVG path of a dot: a line of length 0 with round ends, which stays round in a stretched SVG."""
    return f"M{x:.1f} {y:.1f}h0"


def lay_out(chart: Chart, *, last_step: float) -> Plot | None:
    """Return the layout of a chart's curves and ticks without non-finite values; None if nothing remains."""
    lines = [replace(line, points=_thinned(_finite(line.points))) for line in chart.lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    low, high = _range(lines, chart.from_zero)
    width = last_step or 1

    def place(point: Point) -> Point:
        # Clip outliers of the raw curve at the edge.
        return SIDE * point[0] / width, SIDE * min(1.0, max(0.0, 1 - (point[1] - low) / (high - low)))

    named = [line for line in lines if line.kind != "faint"]
    curves = [
        {"name": line.name, "points": [[step, chart.write(value)] for step, value in line.points]}
        for line in named
    ]
    return Plot(
        chart.title,
        chart.note,
        legend=[(line.name, line.colour) for line in named] if len(named) > 1 else [],
        x_ticks=[(100 * t / width, formatting.number(t)) for t in ticks(0, width) if t == int(t)],
        y_ticks=[(place((0, t))[1] / 10, chart.write(t)) for t in ticks(low, high)],
        marks=[mark for line in lines for mark in _marks(line, [place(point) for point in line.points])],
        values=json_text({"last": width, "lines": curves}),
    )


def _marks(line: Line, points: Sequence[Point]) -> list[Mark]:
    marks = []
    label = line.name if line.key else ""
    if len(points) > 1:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        marks.append(Mark(f"{line.kind} c{line.colour}", path, label, line.key))
    if line.kind == "dots" or len(points) == 1:
        marks.append(Mark(f"dot c{line.colour}", "".join(dot(x, y) for x, y in points), label, line.key))
    return marks


def _range(lines: Sequence[Line], from_zero: bool) -> tuple[float, float]:
    # The raw curve does not affect the range, so that its outliers do not flatten the other curves.
    values = sorted(v for line in lines if line.kind != "faint" for _, v in line.points)
    raw = sorted(v for line in lines if line.kind == "faint" for _, v in line.points)
    if raw:
        values += [raw[int(0.02 * (len(raw) - 1))], raw[math.ceil(0.98 * (len(raw) - 1))]]
    low, high = min(values), max(values)
    if from_zero:
        low = min(0.0, low)
    margin = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return (low if from_zero and low == 0 else low - margin), high + margin


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thinned(points: list[Point]) -> list[Point]:
    if len(points) <= MOST_POINTS:
        return points
    every = math.ceil(len(points) / MOST_POINTS)
    groups = [points[i : i + every] for i in range(0, len(points), every)]
    return [(group[-1][0], sum(v for _, v in group) / len(group)) for group in groups]
