"""Parallel coordinates: one line per trial through an axis for each searched key and metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dreamfleet.trainers.config.metrics import figure_title
from dreamfleet.trainers.config.search import Domain
from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.report.charts import SIDE, Mark, ticks
from dreamfleet.tune.plots import log_ticks
from dreamfleet.tune.trial_plots import formatter, is_higher_better, upper_limit
from dreamfleet.tune.trial_store import Trial, TrialStore, format_point, format_value

GRADES = 5  # classes g0 (best) to g4 of lines, by rank


@dataclass(frozen=True)
class Axis:
    """An axis with its title, and its ticks: per cent from the top, and text."""

    title: str
    ticks: Sequence[tuple[float, str]]
    place: Callable[[Trial], float | None]  # of a trial: 0 at the bottom, 1 at the top


@dataclass(frozen=True)
class ParallelPlot:
    """The axes from left to right, and a mark for each trial."""

    axes: Sequence[Axis]
    marks: Sequence[Mark]


def parallel_plot(store: TrialStore, shown: Sequence[Trial]) -> ParallelPlot | None:
    """Return the plot of the trials that measured every metric, ``shown`` from the best to the worst.

    None for fewer than two trials.
    """
    axes = [_key_axis(path, domain) for path, domain in store.search.space.items()]
    axes += [_figure_axis(store, name, shown) for name in store.search.metrics]
    marks, best = [], store.best
    for rank, trial in enumerate(shown):
        places = [axis.place(trial) for axis in axes]
        heights = [place for place in places if place is not None]
        if len(heights) < len(axes):
            continue
        width = SIDE / (len(axes) - 1)
        path = "M" + "L".join(
            f"{k * width:.1f} {SIDE * (1 - height):.1f}" for k, height in enumerate(heights)
        )
        values = ", ".join(
            f"{figure_title(name)} {formatting.number(trial.figure(name) or 0.0, 4)}"
            for name in store.search.metrics
        )
        style = f"g{GRADES * rank // len(shown)}{' best' if trial is best else ''}"
        marks.append(Mark(style, path, f"{trial.name}: {format_point(trial.point)}, {values}", trial.name))
    return ParallelPlot(axes, marks[::-1]) if len(marks) > 1 else None


def _key_axis(path: str, domain: Domain) -> Axis:
    title = path.rpartition(".")[2]
    if domain.values is not None:
        values: Sequence[Any] = domain.values
        last = max(1, len(values) - 1)
        marks = [(100 - 100 * k / last, format_value(value)) for k, value in enumerate(values)]
        return Axis(title, marks, lambda trial: values.index(trial.point[path]) / last)
    lower, upper = domain.range()
    scale: Callable[[float], float] = math.log if domain.log else float
    low, high = scale(lower), scale(upper)
    found = log_ticks(lower, upper, 5) if domain.log else ticks(lower, upper)
    marks = [(100 * (high - scale(tick)) / (high - low), formatting.number(tick)) for tick in found]
    return Axis(title, marks, lambda trial: (scale(float(trial.point[path] or 0)) - low) / (high - low))


def _figure_axis(store: TrialStore, name: str, shown: Sequence[Trial]) -> Axis:
    """Return the axis of a metric, with the better values at the top."""
    limit, is_up = upper_limit(store, name, shown), is_higher_better(store, name)
    values = [min(value, limit) for trial in shown if (value := trial.figure(name)) is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    width = high - low or 1.0

    def height(value: float) -> float:
        up = (min(value, limit) - low) / width
        return up if is_up else 1 - up

    def place(trial: Trial) -> float | None:
        value = trial.figure(name)
        return None if value is None else height(value)

    write = formatter(values)
    return Axis(
        figure_title(name), [(100 - 100 * height(tick), write(tick)) for tick in ticks(low, high)], place
    )
