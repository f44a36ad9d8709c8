"""A scatter plot for a search's report, laid out for the ``chart`` macro of the run report's templates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.report.charts import SIDE, Mark, Plot, dot, ticks


@dataclass(frozen=True)
class Dot:
    """One trial in a scatter plot; ``colour`` is 0 to 3, ``key`` the name of the trial."""

    x: float
    y: float
    colour: int
    label: str
    is_pale: bool
    is_ringed: bool
    key: str = ""


def scatter(
    title: str,
    note: str,
    dots: Sequence[Dot],
    legend: Sequence[str],
    *,
    log: bool,
    write: Callable[[float], str],
    line: Sequence[tuple[float, float]] = (),
) -> Plot | None:
    """Return the layout of dots and ticks; None without dots.

    With ``log``, ``x`` has a logarithmic scale. ``write`` formats ``y``. ``line`` are the points (x, y) of a line
    behind the dots.
    """
    if not dots:
        return None
    scale = math.log10 if log else float
    left, right = _widened([scale(dot.x) for dot in dots])
    low, high = _widened([dot.y for dot in dots])

    def across(x: float) -> float:
        return (scale(x) - left) / (right - left)

    def down(y: float) -> float:
        return (high - y) / (high - low)

    marks = []
    if len(line) > 1:
        path = "M" + "L".join(f"{SIDE * across(x):.1f} {SIDE * down(y):.1f}" for x, y in line)
        marks.append(Mark("faint c4", path))
    for one in sorted(dots, key=lambda one: one.is_ringed):
        path = dot(SIDE * across(one.x), SIDE * down(one.y))
        if one.is_ringed:
            marks.append(Mark("ring", path))
        marks.append(Mark(f"dot c{one.colour}{' pale' if one.is_pale else ''}", path, one.label, one.key))
    x_ticks = log_ticks(10**left, 10**right) if log else ticks(left, right)
    return Plot(
        title,
        note,
        legend=[(name, number % 4) for number, name in enumerate(legend)],
        x_ticks=[(100 * across(t), formatting.number(t)) for t in x_ticks],
        y_ticks=[(100 * down(t), write(t)) for t in ticks(low, high)],
        marks=marks,
    )


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round values within [low, high]: 1, 2 and 5 times powers of ten, or fewer per power if over ``most``."""
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
