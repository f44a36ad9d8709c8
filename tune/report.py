"""Writes a search's report.html: the trials, what they measured, and what they drew, in one file."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape

from dreamfleet.trainers.config.search import HELD_OUT
from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.report.charts import Chart, Line, draw
from dreamfleet.trainers.report.comparison import SCORES
from dreamfleet.trainers.report.report import METHODS, page
from dreamfleet.tune.plots import Dot, scatter
from dreamfleet.tune.sheet import axes, image_sheet
from dreamfleet.tune.trial_store import BEST, Ledger, Trial, tell_point, tell_value

NAMED_CURVES = 4  # as many as there are colours
STATUS = {"stopped": "stopped early", "running": "interrupted"}
NAMES = {HELD_OUT: "held-out loss", **SCORES}


def write_search_report(ledger: Ledger) -> None:
    """Write ``report.html`` into the folder of a search."""
    ledger.folder.write_text("report.html", render(ledger))


def render(ledger: Ledger) -> str:
    """Return the report of a search as HTML; links to the trials' own reports are all that it refers to."""
    sections = [
        _head(ledger), _figures(ledger), image_sheet(ledger), _charts(ledger), _table(ledger), _recipe(ledger),
    ]  # fmt: skip
    return page(ledger.recipe.run_name, sections)


def metric_name(metric: str) -> str:
    """Write a figure's name for people."""
    return NAMES.get(metric, metric)


def _head(ledger: Ledger) -> str:
    method = METHODS.get(ledger.recipe.method.name, ledger.recipe.method.name)
    counts = Counter(STATUS.get(trial.status, trial.status) for trial in ledger.trials)
    words = [f"{len(ledger.trials)} trials", *(f"{count} {status}" for status, count in counts.most_common())]
    words.append(f"{formatting.seconds(sum(trial.seconds for trial in ledger.trials))} of computing")
    open_ones = any(not trial.is_over for trial in ledger.trials)
    hint = (
        "<p class='note'>Interrupted. The same command with <code>--resume</code> goes on.</p>"
        if open_ones
        else ""
    )
    return (
        f'<header><p class="over">Search · {escape(method)}</p><h1>{escape(ledger.recipe.run_name)}</h1>'
        f"<p>{escape(' · '.join(words))}</p>{hint}</header>"
    )


def _figures(ledger: Ledger) -> str:
    best, metric = ledger.best, ledger.search.metric
    if best is None:
        return ""
    measured = [value for trial in ledger.trials if (value := trial.figure(metric)) is not None]
    told = []
    for name in sorted(ledger.figures, key=lambda name: name != metric):
        if (value := best.figure(name)) is not None:
            note = f"median {formatting.number(statistics.median(measured), 4)}" if name == metric else ""
            told.append((metric_name(name), formatting.number(value, 4), note))
    for path, chosen in best.point.items():
        section, _, key = path.rpartition(".")
        told.append((key, tell_value(chosen), section))
    cards = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><small>{escape(note)}</small></div>"
        for name, value, note in told
    )
    command = f"dreamfleet train {ledger.folder.path(BEST)}"
    where = f"It is {escape(best.name)}; its recipe is written out: <code>{escape(command)}</code>"
    return f'<section><h2>The best trial</h2><p class="note">{where}</p><dl class="figures">{cards}</dl></section>'


def _charts(ledger: Ledger) -> str:
    shown = [trial for trial in ledger.ranking() if trial.figure(ledger.search.metric) is not None]
    if not shown:
        return ""
    metric = ledger.search.metric
    others = [name for name in ledger.figures if name != metric]
    charts = _curves(ledger, shown) + "".join(_scatter(ledger, shown, name) for name in [metric, *others])
    return f'<section><h2>What they measured</h2><div class="charts">{charts}</div></section>'


def _curves(ledger: Ledger, shown: Sequence[Trial]) -> str:
    metric = ledger.search.metric
    edge = _edge(metric, shown)
    lines = []
    for place, trial in enumerate(shown):
        points = [(float(r["step"]), min(r[metric], edge)) for r in trial.rounds if metric in r]
        kind = "dots" if place < NAMED_CURVES else "faint"
        lines.append(Line(f"{trial.name} ({tell_point(trial.point)})", points, kind, place % NAMED_CURVES))
    write = _writer([value for line in lines for _, value in line.points])
    note = f"The best {NAMED_CURVES} in colour." if len(shown) > NAMED_CURVES else ""
    chart = Chart(f"{_title(metric)} of the trials", lines, note, write=write)
    return draw(chart, last_step=max(trial.steps for trial in shown))


def _scatter(ledger: Ledger, shown: Sequence[Trial], figure: str) -> str:
    """Plot a figure of the trials' last rounds over the key that runs across the picture sheet."""
    across, down = axes(ledger.search)
    groups = sorted({trial.point[down] for trial in shown}, key=str) if down else []
    if not down or not ledger.search.space[down].values:
        groups = []
    edge = _edge(figure, shown)
    dots = []
    for trial in shown:
        x, y = trial.point[across], trial.figure(figure)
        if isinstance(x, str | bool | None) or y is None:
            continue
        words = f"{trial.name}: {tell_point(trial.point)}, {formatting.number(y, 4)} at step {trial.steps}"
        colour = groups.index(trial.point[down]) % NAMED_CURVES if down and groups else 0
        dots.append(Dot(x, min(y, edge), colour, words, trial.status == "stopped", trial is ledger.best))
    name = across.rpartition(".")[2]
    return scatter(
        f"{_title(figure)} by {name}",
        "At each trial's last round. Ringed: the best trial; pale: stopped early."
        if figure == ledger.search.metric
        else "",
        dots,
        [f"{str(down).rpartition('.')[2]} {tell_value(group)}" for group in groups],
        log=ledger.search.space[across].log,
        write=_writer([dot.y for dot in dots]),
    )


def _title(metric: str) -> str:
    name = metric_name(metric)
    return name[0].upper() + name[1:]


def _writer(values: Sequence[float]) -> Callable[[float], str]:
    # Trials may lie so close together that they differ in the fifth digit only.
    spread = max(values, default=0) - min(values, default=0)
    size = max(map(abs, values), default=0)
    digits = max(3, 2 + math.ceil(math.log10(size / spread))) if spread else 4
    return lambda value: formatting.number(value, digits)


def _edge(metric: str, trials: Sequence[Trial]) -> float:
    # A trial whose loss has run away must not flatten the others; scores cannot run away.
    values = [value for trial in trials if (value := trial.figure(metric)) is not None]
    if metric != HELD_OUT or not values:
        return math.inf
    best, middle = min(values), statistics.median(values)
    return middle + 3 * (middle - best) if middle > best else math.inf


def _table(ledger: Ledger) -> str:
    keys, figures = list(ledger.search.space), ledger.figures
    names = [
        "trial",
        *(path.rpartition(".")[2] for path in keys),
        *(metric_name(name) for name in figures),
        "steps",
        "time",
        "",
    ]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = ""
    for trial in ledger.ranking():
        cells = [tell_value(trial.point[path]) for path in keys]
        cells += ["" if (v := trial.figure(name)) is None else formatting.number(v, 4) for name in figures]
        cells += [formatting.number(trial.steps), formatting.seconds(trial.seconds)]
        mark = ' class="best"' if trial is ledger.best else ""
        told = escape(STATUS.get(trial.status, trial.status))
        if trial.error:
            told = f'<span title="{escape(trial.error)}">{told}: {escape(trial.error[:80])}</span>'
        body += (
            f'<tr{mark}><td><a href="{escape(trial.folder)}/report.html">{escape(trial.name)}</a></td>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + f"<td class='state-of'>{told}</td></tr>"
        )
    return (
        "<section><h2>All trials</h2><div class='wide' tabindex='0'><table class='trials'>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _recipe(ledger: Ledger) -> str:
    return (
        "<section><h2>Recipe</h2><details><summary>search.yaml, as it was resolved</summary>"
        f"<pre>{escape(ledger.recipe.to_yaml())}</pre></details></section>"
    )
