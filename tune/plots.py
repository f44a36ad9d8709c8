"""A scatter plot for the search's report, in the report's own style: inline SVG that stretches, labels in HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.report.charts import ticks


@dataclass(frozen=True)
class Dot:
    """One trial: where it lies, its colour (0 to 3), what it is, whether it ended early, and whether it is the best."""

    x: float
    y: float
    colour: int
    words: str
    pale: bool
    ringed: bool


def scatter(
    title: str,
    note: str,
    dots: Sequence[Dot],
    legend: Sequence[str],
    *,
    log: bool,
    write: Callable[[float], str],
) -> str:
    """Return a scatter plot as an HTML figure; ``x`` is on a logarithmic scale with ``log``, ``write`` is for ``y``."""
    if not dots:
        return ""
    scale = math.log10 if log else float
    left, right = _widened([scale(dot.x) for dot in dots])
    low, high = _widened([dot.y for dot in dots])

    def place(x: float, y: float) -> tuple[float, float]:
        return 100 * (scale(x) - left) / (right - left), 100 * (high - y) / (high - low)

    across = log_ticks(10**left, 10**right) if log else ticks(left, right)
    labels = "".join(
        f'<span class="x" style="left:{place(t, high)[0]:.2f}%">{escape(formatting.number(t))}</span>'
        for t in across
    ) + "".join(
        f'<span class="y" style="top:{100 * (high - t) / (high - low):.2f}%"><i>{escape(write(t))}</i></span>'
        for t in ticks(low, high)
    )
    marks = ""
    for dot in sorted(dots, key=lambda dot: dot.ringed):
        x, y = place(dot.x, dot.y)
        ring = f'<path class="ring" d="M{x:.2f} {y:.2f}h0"/>' if dot.ringed else ""
        pale = " pale" if dot.pale else ""
        words = f"<title>{escape(dot.words)}</title>"
        marks += f'{ring}<path class="dot c{dot.colour}{pale}" d="M{x:.2f} {y:.2f}h0">{words}</path>'
    words = f"<p>{escape(note)}</p>" if note else ""
    keys = "".join(f'<span class="key c{n % 4}">{escape(name)}</span>' for n, name in enumerate(legend))
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3>{keys}{words}</figcaption>'
        f'<div class="plot still">{labels}<svg viewBox="0 0 100 100" preserveAspectRatio="none">{marks}</svg></div>'
        "</figure>"
    )


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """List round values within [low, high]: 1, 2 and 5 times the powers of ten, or the powers alone where many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [value for p in powers for f in factors if low <= (value := f * 10.0**p) <= high]
        if len(found) <= most:
            break
    return found


def _widened(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin
