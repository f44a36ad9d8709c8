"""Line charts for the report: inline SVG that stretches with the page, labels in HTML so that text never does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from dreamfleet.datasets.json_text import json_text
from dreamfleet.trainers.report import formatting

MOST_POINTS = 500  # more than a screen shows
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One curve. `kind`: "plain", "faint" (raw values behind a smooth line) or "dots" (few measured points)."""

    name: str
    points: Sequence[Point]
    kind: str = "plain"
    colour: int = 0


@dataclass(frozen=True)
class Chart:
    """A titled set of curves over the optimizer steps."""

    title: str
    lines: Sequence[Line]
    note: str = ""
    from_zero: bool = False
    write: Callable[[float], str] = field(default=formatting.number)


def smooth(points: Sequence[Point], window: float = 0.06) -> list[Point]:
    """Smooth a curve by an exponential average over about `window` of its length, unbiased at the start."""
    keep = 1 - 1 / max(1.0, window * len(points))
    total = weight = 0.0
    smoothed = []
    for step, value in points:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append((step, total / weight))
    return smoothed


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """List about `count` round values that lie within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    width = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / width - 1e-9)
    return [round(k * width, 12) for k in range(first, math.floor(high / width + 1e-9) + 1)]


def draw(chart: Chart, *, last_step: float) -> str:
    """Return a chart as an HTML figure; points that are no numbers are left out."""
    lines = [Line(x.name, _thinned(_finite(x.points)), x.kind, x.colour) for x in chart.lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    low, high = _range(lines, chart.from_zero)
    width = last_step or 1

    def place(point: Point) -> tuple[float, float]:
        # A spike of the raw curve ends at the edge.
        return 1000 * point[0] / width, 1000 * min(1.0, max(0.0, 1 - (point[1] - low) / (high - low)))

    y_ticks = "".join(
        f'<span class="y" style="top:{place((0, t))[1] / 10:.2f}%"><i>{escape(chart.write(t))}</i></span>'
        for t in ticks(low, high)
    )
    steps = [t for t in ticks(0, width, 4) if t == int(t)]
    x_ticks = "".join(
        f'<span class="x" style="left:{100 * t / width:.2f}%">{escape(formatting.number(t))}</span>'
        for t in steps
    )
    paths = "".join(_path(line, place) for line in lines)
    named = [line for line in lines if line.kind != "faint"]
    legend = (
        "".join(f'<span class="key c{x.colour}">{escape(x.name)}</span>' for x in named)
        if len(named) > 1
        else ""
    )
    told = [
        {
            "name": line.name,
            "points": [[s, chart.write(v)] for s, v in line.points],
        }
        for line in named
    ]
    data = escape(json_text({"last": width, "lines": told}))
    note = f"<p>{escape(chart.note)}</p>" if chart.note else ""
    return (
        f'<figure class="chart"><figcaption><h3>{escape(chart.title)}</h3>{legend}{note}</figcaption>'
        f'<div class="plot" data-chart="{data}">{y_ticks}{x_ticks}'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{paths}</svg></div></figure>'
    )


def _path(line: Line, place: Callable[[Point], tuple[float, float]]) -> str:
    spots = [place(point) for point in line.points]
    route = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
    curve = f'<path class="{line.kind} c{line.colour}" d="{route}"/>' if len(spots) > 1 else ""
    if (
        line.kind == "dots" or len(spots) == 1
    ):  # a line of no length with round ends stays round when stretched
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in spots)
        curve += f'<path class="dot c{line.colour}" d="{dots}"/>'
    return curve


def _range(lines: Sequence[Line], from_zero: bool) -> tuple[float, float]:
    # A few spikes of the raw curve must not flatten the rest: they may leave the picture.
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
