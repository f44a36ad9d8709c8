"""Writes a search's report.html: the trials, what they measured, and what they drew, in one file."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape

from dreamfleet.trainers import wording
from dreamfleet.trainers.charts import Chart, Line, draw
from dreamfleet.trainers.comparison import SCORES
from dreamfleet.trainers.report import METHODS, page
from dreamfleet.trainers.searching import HELD_OUT
from dreamfleet.tune.ledger import BEST, Ledger, Trial, tell_point, tell_value
from dreamfleet.tune.plots import Dot, scatter
from dreamfleet.tune.sheet import axes, picture_sheet

NAMED_CURVES = 4  # as many as there are colours
STATUS = {"stopped": "stopped early", "running": "interrupted"}
NAMES = {HELD_OUT: "held-out loss", **SCORES}


def write_search_report(ledger: Ledger) -> None:
    """Write ``report.html`` into the folder of a search."""
    ledger.folder.write_text("report.html", render(ledger))


def render(ledger: Ledger) -> str:
    """Return the report of a search as HTML; links to the trials' own reports are all that it refers to."""
    sections = [
        _head(ledger), _figures(ledger), picture_sheet(ledger), _curves(ledger), _table(ledger), _recipe(ledger),
    ]  # fmt: skip
    return page(ledger.recipe.run_name, sections)


def metric_name(metric: str) -> str:
    """Write a figure's name for people."""
    return NAMES.get(metric, metric)


def _head(ledger: Ledger) -> str:
    method = METHODS.get(ledger.recipe.method.name, ledger.recipe.method.name)
    counts = Counter(STATUS.get(trial.status, trial.status) for trial in ledger.trials)
    words = [f"{len(ledger.trials)} trials", *(f"{count} {status}" for status, count in counts.most_common())]
    words.append(f"{wording.seconds(sum(trial.seconds for trial in ledger.trials))} of computing")
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
            note = f"median {wording.number(statistics.median(measured), 4)}" if name == metric else ""
            told.append((metric_name(name), wording.number(value, 4), note))
    for path, chosen in best.point.items():
        section, _, key = path.rpartition(".")
        told.append((key, tell_value(chosen), section))
    cards = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><small>{escape(note)}</small></div>"
        for name, value, note in told
    )
    command = f"dreamfleet train {ledger.folder.path(BEST)}"
    where = f"It is {best.name}; its recipe is written out: <code>{escape(command)}</code>"
    return f'<section><h2>The best trial</h2><p class="note">{where}</p><dl class="figures">{cards}</dl></section>'


def _curves(ledger: Ledger) -> str:
    metric = ledger.search.metric
    shown = [trial for trial in ledger.ranking() if trial.figure(metric) is not None]
    if not shown:
        return ""
    edge = _edge([v for trial in shown if (v := trial.figure(metric)) is not None], ledger.search.maximise)
    lines = []
    for place, trial in reversed(list(enumerate(shown))):
        points = [(float(r["step"]), min(r[metric], edge)) for r in trial.rounds if metric in r]
        named = place < NAMED_CURVES
        words = f"{trial.name} ({tell_point(trial.point)})"
        lines.append(Line(words, points, "dots" if named else "faint", place % NAMED_CURVES))
    write = _writer([value for line in lines for _, value in line.points])
    note = f"The best {NAMED_CURVES} in colour." if len(shown) > NAMED_CURVES else ""
    chart = Chart(f"{_title(metric)} of the trials", lines[::-1], note, write=write)
    charts = draw(chart, last_step=max(trial.steps for trial in shown)) + _scatter(ledger, shown, edge, write)
    return f'<section><h2>What they measured</h2><div class="charts">{charts}</div></section>'


def _scatter(ledger: Ledger, shown: Sequence[Trial], edge: float, write: Callable[[float], str]) -> str:
    search = ledger.search
    across, down = axes(search)
    if any(isinstance(t.point[across], str | bool | None) for t in shown):
        return ""
    groups = sorted({t.point[down] for t in shown}, key=str) if down and search.space[down].values else []
    dots = []
    for trial in shown:
        x, y = trial.point[across], trial.figure(search.metric)
        assert isinstance(x, int | float) and y is not None
        colour = groups.index(trial.point[down]) % 4 if groups and down else 0
        words = f"{trial.name}: {tell_point(trial.point)}, {wording.number(y, 4)} at step {trial.steps}"
        dots.append(Dot(x, min(y, edge), colour, words, trial.status == "stopped", trial is ledger.best))
    legend = [f"{down.rpartition('.')[2]} {tell_value(group)}" for group in groups] if down and groups else []
    name = across.rpartition(".")[2]
    log = search.space[across].log or all(dot.x > 0 for dot in dots)
    note = "At each trial's last round. Ringed: the best trial; pale: stopped early."
    title = f"{_title(search.metric)} by {name}"
    return scatter(title, note, dots, legend, log=log, write=write)


def _title(metric: str) -> str:
    name = metric_name(metric)
    return name[0].upper() + name[1:]


def _writer(values: Sequence[float]) -> Callable[[float], str]:
    # Trials may lie so close together that they differ in the fifth digit only.
    spread, size = max(values) - min(values), max(map(abs, values))
    digits = max(3, 2 + math.ceil(math.log10(size / spread))) if spread else 4
    return lambda value: wording.number(value, digits)


def _edge(values: Sequence[float], maximise: bool) -> float:
    # A trial whose loss has run away must not flatten the others.
    best, middle = (max if maximise else min)(values), statistics.median(values)
    return middle + 3 * (middle - best) if middle != best else math.inf


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
        cells += ["" if (v := trial.figure(name)) is None else wording.number(v, 4) for name in figures]
        cells += [wording.number(trial.steps), wording.seconds(trial.seconds)]
        mark = ' class="best"' if trial is ledger.best else ""
        told = escape(STATUS.get(trial.status, trial.status))
        if trial.error:
            told = f'<span title="{escape(trial.error)}">{told}: {escape(trial.error[:80])}</span>'
        body += (
            f'<tr{mark}><td><a href="{trial.folder}/report.html">{trial.name}</a></td>'
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
