"""Writes report.html: what a run learned, in one file that needs nothing else.

The page is made from the run folder alone, so it can be written again at any time, also for a run that was stopped
or is still going; what is not there yet is left out.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.artifacts.kind import Usage
from dreamfleet.trainers.artifacts.usage import describe
from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.report.charts import Chart, Line, draw, smooth
from dreamfleet.trainers.report.comparison import SCORE_NOTES, SCORES, compare, over_time
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.report.preview_grid import Sheet, read_real, read_sheets

log = logging.getLogger(__name__)
MOST_SHEETS = 16
ACCURACY = "accuracy/"  # and a class: its figure
METHODS = {
    "dreambooth": "DreamBooth",
    "textual_inversion": "Textual Inversion",
    "native": "Native fine-tuning",
}


@dataclass(frozen=True)
class Pages:
    """What a run folder holds, read once."""

    run: Storage
    name: str
    recipe: dict[str, Any]
    recipe_text: str
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    sheets: list[Sheet]

    @property
    def method(self) -> str:
        """The method's name as people write it."""
        name = str(self.summary.get("method") or _get(self.recipe, "method", "name") or "")
        return METHODS.get(name, name.replace("_", " ").capitalize())

    @property
    def last_step(self) -> int:
        """The last optimizer step anything is known of."""
        steps = [int(line.get("step", 0)) for line in self.metrics]
        return max([int(self.summary.get("steps") or 0), *steps, *(sheet.step for sheet in self.sheets)])

    def curve(self, key: str) -> list[tuple[float, float]]:
        """The logged values of a figure over the steps."""
        found = ((line.get("step", 0), line.get(key)) for line in self.metrics)
        return [(float(step), float(v)) for step, v in found if _is_number(v)]


def write_report(run: Storage) -> None:
    """Write `report.html` into a run folder from what lies there."""
    run.write_text("report.html", render(run))


def render(run: Storage) -> str:
    """Return the report of a run folder as HTML without any reference to the outside."""
    pages = _read(run)
    resolution = _get(pages.recipe, "data", "resolution")
    real = read_real(run, resolution if isinstance(resolution, int) else None)
    sections = [
        _head(pages), _figures(pages), compare(pages.sheets, real), over_time(pages.sheets), _curves(pages),
        _timings(pages), _artifacts(pages), _checkpoints(pages), _left_out(pages), _recipe(pages),
    ]  # fmt: skip
    return page(pages.name, sections)


def page(title: str, sections: Iterable[str]) -> str:
    """Join sections to a whole page that needs nothing else; empty ones are left out."""
    here = Path(__file__)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)} · dreamfleet</title>\n"
        f"<style>{here.with_suffix('.css').read_text()}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main>\n<script>{here.with_suffix('.js').read_text()}</script></body></html>\n"
    )


def _read(run: Storage) -> Pages:
    recipe_text = _text(run, "recipe.yaml")
    try:
        recipe = yaml.safe_load(recipe_text)
        summary = json.loads(_text(run, "summary.json") or "{}")
    except (yaml.YAMLError, ValueError) as error:
        log.warning("the report of %s is written without recipe and summary: %s", run.url, error)
        recipe, summary = {}, {}
    recipe, summary = (x if isinstance(x, dict) else {} for x in (recipe, summary))
    name = str(summary.get("run") or run.url.rstrip("/").rpartition("/")[2])
    metrics = [line for line in read_metrics(run) if isinstance(line, dict)]
    return Pages(run, name, recipe, recipe_text, summary, metrics, read_sheets(run, MOST_SHEETS))


def _text(run: Storage, rel: str) -> str:
    return run.read_text(rel) if run.exists(rel) else ""


def _get(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _head(pages: Pages) -> str:
    reason = pages.summary.get("exit_reason")
    state = {"completed": "completed", "interrupted": "stopped early", None: "in progress"}.get(
        reason, str(reason)
    )
    steps = formatting.number(pages.last_step)
    words = [f"{steps} optimizer step{'s' if pages.last_step != 1 else ''}"]
    if images := pages.summary.get("images_seen"):
        words.append(f"{formatting.number(images)} pictures shown")
    if workers := pages.summary.get("workers"):
        words.append(
            f"{workers} worker{'s' if workers != 1 else ''} on {pages.summary.get('device') or 'cpu'}"
        )
    if wall := pages.summary.get("wall_seconds"):
        words.append(formatting.seconds(wall))
    hint = ""
    if reason == "interrupted":
        hint = "<p class='note'>Stopped before its last step. The same command with <code>--resume</code> goes on.</p>"
    return (
        f'<header><p class="over">{escape(pages.method)} <span class="state">{escape(state)}</span></p>'
        f"<h1>{escape(pages.name)}</h1><p>{escape(' · '.join(words))}</p>{hint}</header>"
    )


def _figures(pages: Pages) -> str:
    told: list[tuple[str, str, str]] = []
    held_out = pages.curve("holdout_loss")
    if held_out:
        note = f"base {formatting.number(held_out[0][1])}" if held_out[0][0] == 0 < held_out[-1][0] else ""
        told.append(("held-out loss", formatting.number(held_out[-1][1]), note))
    if accuracy := pages.curve("accuracy"):
        told.append(("held-out accuracy", formatting.share(accuracy[-1][1]), "pictures in their class"))
    if loss := smooth(pages.curve("loss")):
        told.append(("training loss", formatting.number(loss[-1][1]), "smoothed"))
    figures = {**(_get(pages.summary, "figures") or {}), **(_get(pages.summary, "scores") or {})}
    for key, value in figures.items():
        if key in SCORES and _is_number(value):
            before = [v for step, v in pages.curve(key) if step == 0]
            told.append(
                (
                    SCORES[key],
                    formatting.number(value),
                    f"base {formatting.number(before[0])}" if before else "",
                )
            )
    if _is_number(speed := figures.get("images_per_second")):
        told.append(("pictures / s", formatting.number(speed), "all workers"))
    if _is_number(memory := figures.get("peak_memory_bytes")):
        told.append(("peak memory", formatting.size(memory), "of one worker"))
    if _is_number(wait := figures.get("data_wait_fraction")):
        told.append(("waiting for data", formatting.share(wait), "of training"))
    cards = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><small>{escape(note)}</small></div>"
        for name, value, note in told
    )
    return f'<dl class="figures">{cards}</dl>' if cards else ""


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _curves(pages: Pages) -> str:
    loss = pages.curve("loss")
    rates: dict[str, list[tuple[float, float]]] = {}
    for line in pages.metrics:
        for group, rate in (line.get("lr") or {}).items():
            if _is_number(rate):
                rates.setdefault(str(group), []).append((float(line["step"]), float(rate)))
    parts = [("instance_loss", "subject"), ("prior_loss", "class")]
    classes = list(dict.fromkeys(k for line in pages.metrics for k in line if k.startswith(ACCURACY)))
    charts = [
        Chart("Training loss", [Line("every log", loss, "faint"), Line("smoothed", smooth(loss))]),
        Chart(
            "Held-out loss",
            [Line("held-out loss", pages.curve("holdout_loss"), "dots", 1)],
            "The same noise and timesteps each time, on pictures that are not trained on.",
        ),
        Chart(
            "Held-out accuracy",
            [
                Line("all", pages.curve("accuracy"), "dots"),
                *(
                    Line(key.removeprefix(ACCURACY), pages.curve(key), colour=1 + n % 3)
                    for n, key in enumerate(classes)
                ),
            ],
        ),
        Chart(
            "Loss on subject and class pictures",
            [Line(name, smooth(pages.curve(key)), colour=n) for n, (key, name) in enumerate(parts)],
        ),
        *(
            Chart(SCORES[key], [Line(SCORES[key], pages.curve(key), "dots", 2)], note)
            for key, note in SCORE_NOTES.items()
        ),
        Chart(
            "Learning rate",
            [Line(k, v, colour=n % 4) for n, (k, v) in enumerate(rates.items())],
            from_zero=True,
        ),
        Chart(
            "Pictures a second", [Line("pictures a second", pages.curve("images_per_second"))], from_zero=True
        ),
    ]
    drawn = [text for chart in charts if (text := draw(chart, last_step=pages.last_step))]
    return f'<section><h2>Curves</h2><div class="charts">{"".join(drawn)}</div></section>' if drawn else ""


def _timings(pages: Pages) -> str:
    summary = pages.summary
    whole, start, train = (summary.get(k) for k in ("wall_seconds", "start_up_seconds", "train_seconds"))
    if not all(_is_number(x) for x in (whole, start, train)) or not whole:
        return ""
    parts = [
        ("start and first previews", start),
        ("training, previews and checkpoints", train),
        ("export", max(0.0, whole - start - train)),
    ]
    bar = "".join(f'<i class="c{n}" style="flex:{max(0.0, s):.3f}"></i>' for n, (_, s) in enumerate(parts))
    rows = [
        (f'<span class="key c{n}">{escape(name)}</span>', formatting.seconds(s))
        for n, (name, s) in enumerate(parts)
    ]
    if times := [v for _, v in pages.curve("step_seconds")]:
        rows.append(("one optimizer step (median)", formatting.seconds(statistics.median(times))))
    rows.append(("altogether", formatting.seconds(whole)))
    return f'<section><h2>Time</h2><div class="share" aria-hidden="true">{bar}</div>{_table(rows)}</section>'


def _artifacts(pages: Pages) -> str:
    run, known = pages.run, pages.summary.get("exports")
    names = known if isinstance(known, list) else [*run.list_dirs("exports"), *run.list("exports")]
    items = []
    for name in map(str, names):
        if not run.exists(f"exports/{name}"):
            continue
        try:
            usage = describe(name, run_name=pages.name, recipe=pages.recipe)
        except UserError as error:
            usage = Usage(str(error), ())
        uses = "".join(f"<li><b>{escape(x.program)}</b> {_code(x.text)}</li>" for x in usage.uses)
        size = formatting.size(run.size(f"exports/{name}"))
        items.append(
            f'<article class="artefact"><h3><code>{escape(name)}</code> <small>{size}</small></h3>'
            f"<p>{escape(usage.what)}</p><ul>{uses}</ul></article>"
        )
    where = f"<p class='note'>in <code>{escape(run.path('exports'))}</code></p>" if items else ""
    return f"<section><h2>Artefacts</h2>{where}{''.join(items)}</section>" if items else ""


def _checkpoints(pages: Pages) -> str:
    run, best, rows = pages.run, pages.summary.get("best_checkpoint"), []
    measured = {f"step-{int(step):06d}" for step, _ in pages.curve("holdout_loss")}
    for name in sorted(run.list_dirs("checkpoints")):
        mark = " <small>best held-out loss</small>" if name == best and name in measured else ""
        rows.append((f"<code>{escape(name)}</code>{mark}", formatting.size(run.size(f"checkpoints/{name}"))))
    return f"<section><h2>Checkpoints</h2>{_table(rows)}</section>" if rows else ""


def _left_out(pages: Pages) -> str:
    bad = pages.summary.get("bad_files") or []
    rows = [(f"<code>{escape(str(x.get('uri')))}</code>", escape(str(x.get("reason")))) for x in bad]
    return f"<section><h2>Pictures left out</h2>{_table(rows, kind='wordy')}</section>" if rows else ""


def _recipe(pages: Pages) -> str:
    if not pages.recipe_text:
        return ""
    return (
        "<section><h2>Recipe</h2><details><summary>recipe.yaml, as it was resolved</summary>"
        f"<pre>{escape(pages.recipe_text)}</pre></details></section>"
    )


def _table(rows: Iterable[tuple[str, str]], kind: str = "plain") -> str:
    lines = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows)
    return f'<table class="{kind}">{lines}</table>'


def _code(text: str) -> str:
    """Escape a sentence and set what stands in backticks as code."""
    return "".join(f"<code>{escape(p)}</code>" if n % 2 else escape(p) for n, p in enumerate(text.split("`")))
