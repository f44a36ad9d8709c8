"""Writes a search's report.html: its trials, their measurements and previews, in one self-contained file."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dreamfleet.trainers.config.method import method_title
from dreamfleet.trainers.config.metrics import figure_title, is_higher_better
from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.report.charts import Chart, Line, Plot, lay_out
from dreamfleet.trainers.report.html import environment
from dreamfleet.tune.plots import Dot, scatter
from dreamfleet.tune.results import BEST
from dreamfleet.tune.sheet import LONGEST_SIDE, axes, image_sheet
from dreamfleet.tune.trial_store import Trial, TrialStore, format_point, format_value

TEMPLATES = Path(__file__).with_name("templates")
NAMED_CURVES = 4  # the number of colours
STATUS = {"stopped": "stopped early", "running": "interrupted"}


def write_search_report(store: TrialStore) -> None:
    """Write ``report.html`` into the folder of a search."""
    store.folder.write_text("report.html", render(store))


def render(store: TrialStore) -> str:
    """Return the report of a search as HTML, without references to files other than the trials' reports."""
    ranking = store.ranking()
    measured = [trial for trial in ranking if trial.figure(store.search.objective) is not None]
    return environment(TEMPLATES).get_template("search.html").render(
        title=store.recipe.run_name,
        method=method_title(store.recipe.method.name),
        facts=_facts(store),
        is_interrupted=any(not trial.is_over for trial in store.trials),
        metric=store.search.objective,
        best=store.best,
        best_recipe=store.folder.path(BEST),
        figures=_figures(store, measured),
        sheet=image_sheet(store),
        longest_side=LONGEST_SIDE,
        plots=list(_plots(store, measured)),
        columns=_columns(store),
        trials=[_row(store, trial) for trial in ranking],
        recipe_text=store.recipe.to_yaml(),
    )  # fmt: skip


def _facts(store: TrialStore) -> list[str]:
    counts = Counter(STATUS.get(trial.status, trial.status) for trial in store.trials)
    return [
        f"{len(store.trials)} trials",
        *(f"{count} {status}" for status, count in counts.most_common()),
        f"{formatting.seconds(sum(trial.seconds for trial in store.trials))} of compute time",
    ]


def _figures(store: TrialStore, measured: Sequence[Trial]) -> list[tuple[str, str, str]]:
    """Return (name, value, note) of the best trial's metrics and of its searched values."""
    best, metric = store.best, store.search.objective
    if best is None:
        return []
    median = statistics.median(value for trial in measured if (value := trial.figure(metric)) is not None)
    cards = []
    for name in sorted(store.figures, key=lambda name: name != metric):
        if (value := best.figure(name)) is not None:
            note = f"median {formatting.number(median, 4)}" if name == metric else ""
            cards.append((figure_title(name), formatting.number(value, 4), note))
    for path, chosen in best.point.items():
        section, _, key = path.rpartition(".")
        cards.append((key, format_value(chosen), section))
    return cards


def _plots(store: TrialStore, shown: Sequence[Trial]) -> Iterator[Plot]:
    """Yield a plot of the metric over the steps, and a scatter plot for every measured key."""
    if not shown:
        return
    metric = store.search.objective
    others = [name for name in store.figures if name != metric]
    for plot in (_curves(metric, shown), *(_scatter(store, shown, name) for name in [metric, *others])):
        if plot is not None:
            yield plot


def _curves(metric: str, shown: Sequence[Trial]) -> Plot | None:
    limit = _upper_limit(metric, shown)
    lines = []
    for rank, trial in enumerate(shown):
        points = [(float(r["step"]), min(r[metric], limit)) for r in trial.rounds if metric in r]
        kind = "dots" if rank < NAMED_CURVES else "faint"
        lines.append(Line(f"{trial.name} ({format_point(trial.point)})", points, kind, rank % NAMED_CURVES))
    write = _formatter([value for line in lines for _, value in line.points])
    note = f"The best {NAMED_CURVES} are coloured." if len(shown) > NAMED_CURVES else ""
    chart = Chart(f"{_title(metric)} of the trials", lines, note, write=write)
    return lay_out(chart, last_step=max(trial.steps for trial in shown))


def _scatter(store: TrialStore, shown: Sequence[Trial], figure: str) -> Plot | None:
    """Return a plot of a measured key in the trials' last rounds over the searched key of the image sheet's columns."""
    across, down = axes(store.search)
    groups = sorted({trial.point[down] for trial in shown}, key=str) if down else []
    if not down or not store.search.space[down].values:
        groups = []
    limit = _upper_limit(figure, shown)
    dots = []
    for trial in shown:
        x, y = trial.point[across], trial.figure(figure)
        if isinstance(x, str | bool | None) or y is None:
            continue
        label = f"{trial.name}: {format_point(trial.point)}, {formatting.number(y, 4)} at step {trial.steps}"
        colour = groups.index(trial.point[down]) % NAMED_CURVES if down and groups else 0
        dots.append(Dot(x, min(y, limit), colour, label, trial.status == "stopped", trial is store.best))
    return scatter(
        f"{_title(figure)} by {across.rpartition('.')[2]}",
        "At the last round of each trial. The best trial is ringed; trials that were stopped early are pale."
        if figure == store.search.objective
        else "",
        dots,
        [f"{str(down).rpartition('.')[2]} {format_value(group)}" for group in groups],
        log=store.search.space[across].log,
        write=_formatter([dot.y for dot in dots]),
    )


def _title(figure: str) -> str:
    title = figure_title(figure)
    return title[0].upper() + title[1:]


def _formatter(values: Sequence[float]) -> Callable[[float], str]:
    """Return a function that formats values with enough digits to distinguish them."""
    spread = max(values, default=0) - min(values, default=0)
    size = max(map(abs, values), default=0)
    digits = max(3, 2 + math.ceil(math.log10(size / spread))) if spread else 4
    return lambda value: formatting.number(value, digits)


def _upper_limit(figure: str, trials: Sequence[Trial]) -> float:
    """Return the value at which a plot is cut, so that a diverged loss does not flatten the other trials."""
    values = [value for trial in trials if (value := trial.figure(figure)) is not None]
    if is_higher_better(figure) or not values:
        return math.inf
    best, middle = min(values), statistics.median(values)
    return middle + 3 * (middle - best) if middle > best else math.inf


def _columns(store: TrialStore) -> list[str]:
    keys = [path.rpartition(".")[2] for path in store.search.space]
    return ["trial", *keys, *map(figure_title, store.figures), "steps", "time", ""]


def _row(store: TrialStore, trial: Trial) -> tuple[Trial, list[str], Any]:
    """Return a trial with the values of its columns and its status."""
    values = [format_value(trial.point[path]) for path in store.search.space]
    values += ["" if (v := trial.figure(name)) is None else formatting.number(v, 4) for name in store.figures]
    values += [formatting.number(trial.steps), formatting.seconds(trial.seconds)]
    return trial, values, STATUS.get(trial.status, trial.status)
