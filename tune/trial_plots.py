"""The charts of a search's report: the metrics of the trials over steps, searched keys and each other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence

from dreamfleet.trainers.config.metrics import figure_title
from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.report.charts import Chart, Line, Plot, lay_out
from dreamfleet.tune.plots import Dot, scatter
from dreamfleet.tune.sheet import axes
from dreamfleet.tune.trial_store import Trial, TrialStore, format_point, format_value

NAMED_CURVES = 4  # the number of colours
GREY = 4
NAMED_LABELS = 2  # with more searched keys, the legend names only the trials


def trial_plots(store: TrialStore, shown: Sequence[Trial]) -> Iterator[Plot]:
    """Yield the curves of the search's metrics, scatter plots of every figure, and Pareto fronts of two metrics.

    ``shown`` are the trials that measured the objective, from the best to the worst.
    """
    if not shown:
        return
    first, *more = store.search.metrics
    others = [name for name in store.figures if name != first]
    plots = [_curves(store, name, shown) for name in (first, *more)]
    plots += [_front(store, name, shown) for name in more]
    plots += [_scatter(store, shown, name) for name in (first, *others)]
    yield from (plot for plot in plots if plot is not None)


def title(figure: str) -> str:
    """Return the title of a figure with a capital letter."""
    text = figure_title(figure)
    return text[0].upper() + text[1:]


def upper_limit(store: TrialStore, figure: str, trials: Sequence[Trial]) -> float:
    """Return the value at which a plot is cut, so that a diverged loss does not flatten the other trials."""
    values = [value for trial in trials if (value := trial.figure(figure)) is not None]
    if is_higher_better(store, figure) or not values:
        return math.inf
    best, middle = min(values), statistics.median(values)
    return middle + 3 * (middle - best) if middle > best else math.inf


def is_higher_better(store: TrialStore, figure: str) -> bool:
    """Return whether higher values of a figure are better, by the search if it is one of its metrics."""
    from dreamfleet.trainers.config.metrics import is_higher_better as by_registry

    return store.search.maximises(figure) if figure in store.search.metrics else by_registry(figure)


def formatter(values: Sequence[float]) -> Callable[[float], str]:
    """Return a function that formats values with enough digits to distinguish them."""
    spread = max(values, default=0) - min(values, default=0)
    size = max(map(abs, values), default=0)
    digits = max(3, 2 + math.ceil(math.log10(size / spread))) if spread else 4
    return lambda value: formatting.number(value, digits)


def _curves(store: TrialStore, metric: str, shown: Sequence[Trial]) -> Plot | None:
    limit = upper_limit(store, metric, shown)
    lines = []
    for rank, trial in enumerate(shown):
        points = [
            (float(r["step"]), min(r[metric], limit)) for r in trial.rounds if r.get(metric) is not None
        ]
        kind, colour = ("dots", rank) if rank < NAMED_CURVES else ("faint", GREY)
        lines.append(Line(_label(trial, kind), points, kind, colour, trial.name))
    write = formatter([value for line in lines for _, value in line.points])
    note = (
        f"The best {NAMED_CURVES} are coloured, best first; the rest are grey."
        if len(shown) > NAMED_CURVES
        else ""
    )
    # The grey curves first, so that the coloured ones are drawn above them.
    chart = Chart(
        f"{title(metric)} of the trials", [*lines[NAMED_CURVES:], *lines[:NAMED_CURVES]], note, write=write
    )
    return lay_out(chart, last_step=max(trial.steps for trial in shown))


def _label(trial: Trial, kind: str) -> str:
    if kind == "dots" and len(trial.point) > NAMED_LABELS:
        return trial.name
    return f"{trial.name} ({format_point(trial.point)})"


def _scatter(store: TrialStore, shown: Sequence[Trial], figure: str) -> Plot | None:
    """Return a plot of a figure in the trials' best rounds over the searched key of the image sheet's columns."""
    across, down = axes(store.search)
    groups = sorted({trial.point[down] for trial in shown}, key=str) if down else []
    if not down or not store.search.space[down].values:
        groups = []
    limit, best = upper_limit(store, figure, shown), store.best
    dots = []
    for trial in shown:
        x, y = trial.point[across], trial.figure(figure)
        if isinstance(x, str | bool | None) or y is None:
            continue
        label = f"{trial.name}: {format_point(trial.point)}, {formatting.number(y, 4)}"
        colour = groups.index(trial.point[down]) % NAMED_CURVES if down and groups else 0
        is_best, is_pale = trial is best, trial.status == "stopped"
        dots.append(Dot(x, min(y, limit), colour, label, is_pale, is_best, trial.name))
    return scatter(
        f"{title(figure)} by {across.rpartition('.')[2]}",
        "At the best round of each trial. The best trial is ringed; trials that were stopped early are pale."
        if figure == store.search.objective
        else "",
        dots,
        [f"{str(down).rpartition('.')[2]} {format_value(group)}" for group in groups],
        log=store.search.space[across].log,
        write=formatter([dot.y for dot in dots]),
    )


def _front(store: TrialStore, other: str, shown: Sequence[Trial]) -> Plot | None:
    """Return a plot of another metric over the objective, with the trials of the Pareto front ringed and joined."""
    first, best = store.search.objective, store.front()
    x_limit, y_limit = upper_limit(store, first, shown), upper_limit(store, other, shown)
    dots = []
    for trial in shown:
        x, y = trial.figure(first), trial.figure(other)
        if x is not None and y is not None:
            values = f"{figure_title(first)} {formatting.number(x, 4)}, {figure_title(other)} {formatting.number(y, 4)}"
            label = f"{trial.name}: {format_point(trial.point)}; {values}"
            is_on_front = any(trial is one for one in best)
            place = (min(x, x_limit), min(y, y_limit))
            dots.append(Dot(*place, 0 if is_on_front else 1, label, not is_on_front, is_on_front, trial.name))
    return scatter(
        f"{title(other)} over {figure_title(first)}",
        "Ringed: the Pareto front. No trial is better than these in every metric of the search.",
        dots,
        [],
        log=False,
        write=formatter([dot.y for dot in dots]),
        line=sorted((dot.x, dot.y) for dot in dots if dot.is_ringed)
        if len(store.search.metrics) == 2
        else (),
    )
