"""Writes report.html: the results of a run in one self-contained file.

The report is generated only from the run folder, so it can be written at any time, including during a run or after it
was stopped. Sections without data are left out.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import yaml

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.method import method_title
from dreamfleet.trainers.config.metrics import HELD_OUT, METRICS, Metric, figure_title
from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.report.charts import Chart, Line, Point, lay_out, smooth
from dreamfleet.trainers.report.comparison import LONGEST_SIDE, compare, over_time
from dreamfleet.trainers.report.events import read_events
from dreamfleet.trainers.report.html import environment
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.report.preview_grid import PreviewGrid, read_preview_grids, read_real_images
from dreamfleet.trainers.report.timeline import read_timeline
from dreamfleet.trainers.report.timeline_view import TimelineView, lay_out_timeline

log = logging.getLogger(__name__)
MOST_GRIDS = 16
ACCURACY = "accuracy/"  # prefix of the keys of class accuracies; followed by the name of the class
# cause of a wait for streamed images (CAUSES in datasets/serve/stream.py) -> its name in the report
BOTTLENECKS = {
    "cpu": "a free CPU",
    "read": "reading files",
    "decode": "decoding",
    "resize": "resizing",
    "transport": "transport between machines",
    "encode": "encoding to latents",
}
# (file name in exports/, run_name=, recipe=) -> an object with `what` and `uses`, each of a `program` and a `text`.
Describe = Callable[..., Any]


@dataclass(frozen=True)
class RunFolder:
    """The contents of a run folder, read once."""

    run: Storage
    name: str
    recipe: dict[str, Any]
    recipe_text: str
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    grids: list[PreviewGrid]

    @property
    def last_step(self) -> int:
        """The last optimizer step found in any file."""
        steps = [int(line.get("step", 0)) for line in self.metrics]
        return max([int(self.summary.get("steps") or 0), *steps, *(grid.step for grid in self.grids)])

    def curve(self, key: str) -> list[Point]:
        """Return the logged values of a key of ``metrics.jsonl`` over the steps."""
        found = ((line.get("step", 0), line.get(key)) for line in self.metrics)
        return [(float(step), float(v)) for step, v in found if _is_number(v)]


def write_report(run: Storage, *, describe: Describe) -> None:
    """Write ``report.html`` into a run folder; ``describe`` explains the files in ``exports/``."""
    run.write_text("report.html", render(run, describe=describe))


def render(run: Storage, *, describe: Describe) -> str:
    """Return the report of a run folder as HTML without references to other files."""
    folder = _read(run)
    resolution = _get(folder.recipe, "data", "resolution")
    real = read_real_images(run, resolution if isinstance(resolution, int) else None)
    return environment().get_template("report.html").render(
        **_head(folder),
        **_timings(folder),
        timeline=_timeline(run),
        longest_side=LONGEST_SIDE,
        figures=_figures(folder),
        comparison=compare(folder.grids, real),
        real=real,
        over_time=over_time(folder.grids),
        plots=[plot for chart in _charts(folder) if (plot := lay_out(chart, last_step=folder.last_step))],
        artifacts=_artifacts(folder, describe),
        exports=run.path("exports"),
        checkpoints=_checkpoints(folder),
        best_by=figure_title(_best_by(folder)),
        traces=sorted(run.list("profile")),
        skipped=[(x.get("uri"), x.get("reason")) for x in folder.summary.get("bad_files") or []],
        recipe_text=folder.recipe_text,
    )  # fmt: skip


def _read(run: Storage) -> RunFolder:
    recipe_text = _text(run, "recipe.yaml")
    try:
        recipe = yaml.safe_load(recipe_text)
        summary = json.loads(_text(run, "summary.json") or "{}")
    except (yaml.YAMLError, ValueError) as error:
        log.warning("the report of %s lacks recipe and summary, which cannot be read: %s", run.url, error)
        recipe, summary = {}, {}
    recipe, summary = (x if isinstance(x, dict) else {} for x in (recipe, summary))
    name = str(summary.get("run") or run.url.rstrip("/").rpartition("/")[2])
    metrics = [line for line in read_metrics(run) if isinstance(line, dict)]
    return RunFolder(run, name, recipe, recipe_text, summary, metrics, read_preview_grids(run, MOST_GRIDS))


def _text(run: Storage, rel: str) -> str:
    return run.read_text(rel) if run.exists(rel) else ""


def _get(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _head(folder: RunFolder) -> dict[str, Any]:
    summary, steps = folder.summary, folder.last_step
    reason = summary.get("exit_reason")
    states = {"completed": "completed", "interrupted": "stopped early", None: "in progress"}
    facts = [f"{formatting.number(steps)} optimizer step{'s' if steps != 1 else ''}"]
    if images := summary.get("images_seen"):
        facts.append(f"{formatting.number(images)} images seen")
    if workers := summary.get("workers"):
        facts.append(f"{workers} worker{'s' if workers != 1 else ''} on {summary.get('device') or 'cpu'}")
    if wall := summary.get("wall_seconds"):
        facts.append(formatting.seconds(wall))
    return {
        "title": folder.name,
        "method": method_title(str(summary.get("method") or _get(folder.recipe, "method", "name") or "")),
        "state": states.get(reason, str(reason)),
        "facts": facts,
        "is_interrupted": reason == "interrupted",
    }


def _figures(folder: RunFolder) -> list[tuple[str, str, str]]:
    """Return (name, value, note) of each figure at the top of the page."""
    cards: list[tuple[str, str, str]] = []
    held_out = folder.curve(HELD_OUT)
    if held_out:
        note = f"base {formatting.number(held_out[0][1])}" if held_out[0][0] == 0 < held_out[-1][0] else ""
        cards.append((figure_title(HELD_OUT), formatting.number(held_out[-1][1]), note))
    if accuracy := folder.curve("accuracy"):
        cards.append(("held-out accuracy", formatting.share(accuracy[-1][1]), "images classified correctly"))
    if loss := smooth(folder.curve("loss")):
        cards.append(("training loss", formatting.number(loss[-1][1]), "smoothed"))
    figures = {**(_get(folder.summary, "figures") or {}), **(_get(folder.summary, "scores") or {})}
    shown = {metric.figure or name: metric for name, metric in METRICS.items()}
    for key, value in figures.items():
        if key in shown and key != HELD_OUT and _is_number(value):
            before = [v for step, v in folder.curve(key) if step == 0]
            note = f"base {formatting.number(before[0])}" if before else ""
            cards.append((shown[key].title, formatting.number(value), note))
    if _is_number(speed := figures.get("images_per_second")):
        cards.append(("images / s", formatting.number(speed), "all workers"))
    if _is_number(memory := figures.get("peak_memory_bytes")):
        cards.append(("peak memory", formatting.size(memory), "of one worker"))
    if _is_number(wait := figures.get("data_wait_fraction")):
        cards.append(("waiting for data", formatting.share(wait), f"of training time{_bottleneck(folder)}"))
    return cards


def _bottleneck(folder: RunFolder) -> str:
    """Return what the stream of images has waited for most of the time; "" if nothing was streamed."""
    waits = _get(folder.summary, "data_waits") or {}
    known = {
        cause: waits[cause] for cause in BOTTLENECKS if _is_number(waits.get(cause)) and waits[cause] > 0
    }
    return f"; mostly for {BOTTLENECKS[max(known, key=lambda cause: known[cause])]}" if known else ""


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _charts(folder: RunFolder) -> list[Chart]:
    loss = folder.curve("loss")
    rates: dict[str, list[Point]] = {}
    for line in folder.metrics:
        # what the optimizer applies, such as Prodigy's d x lr, or else the recipe's rates
        for group, rate in (line.get("effective_lr") or line.get("lr") or {}).items():
            if _is_number(rate):
                rates.setdefault(str(group), []).append((float(line["step"]), float(rate)))
    parts = [("instance_loss", "subject"), ("prior_loss", "class")]
    classes = list(dict.fromkeys(k for line in folder.metrics for k in line if k.startswith(ACCURACY)))
    accuracies = [
        Line(key.removeprefix(ACCURACY), folder.curve(key), colour=1 + n % 3) for n, key in enumerate(classes)
    ]
    speed = folder.curve("images_per_second")
    return [
        Chart("Training loss", [Line("every log", loss, "faint"), Line("smoothed", smooth(loss))]),
        Chart(
            "Held-out loss",
            [Line("held-out loss", folder.curve(HELD_OUT), "dots", 1)],
            METRICS.get("loss").note,
        ),
        Chart("Held-out accuracy", [Line("all", folder.curve("accuracy"), "dots"), *accuracies]),
        Chart(
            "Loss on subject and class images",
            [Line(name, smooth(folder.curve(key)), colour=n) for n, (key, name) in enumerate(parts)],
        ),
        *(_metric_chart(folder, name, metric) for name, metric in METRICS.items() if name != "loss"),
        Chart(
            "Effective learning rate"
            if any("effective_lr" in line for line in folder.metrics)
            else "Learning rate",
            [Line(k, v, colour=n % 4) for n, (k, v) in enumerate(rates.items())],
            from_zero=True,
        ),
        Chart("Images per second", [Line("images per second", speed)], from_zero=True),
    ]


def _metric_chart(folder: RunFolder, name: str, metric: Metric) -> Chart:
    """Return the chart of a metric and its parts."""
    colours = (0, 1, 3, 4)
    parts = [
        Line(part.title, folder.curve(key), "dots", colours[number % len(colours)])
        for number, (key, part) in enumerate(metric.parts.items())
    ]
    return Chart(
        metric.title,
        [Line(metric.title, folder.curve(metric.figure or name), "dots", 2), *parts],
        metric.note,
    )


def _timings(folder: RunFolder) -> dict[str, Any]:
    keys = ("wall_seconds", "start_up_seconds", "train_seconds")
    whole, start, train = (folder.summary.get(key) for key in keys)
    if not (_is_number(whole) and _is_number(start) and _is_number(train) and whole):
        return {"phases": [], "step_seconds": None}
    phases = [
        ("start and first previews", start),
        ("training, previews and checkpoints", train),
        ("export", whole - start - train),
    ]
    times = [seconds for _, seconds in folder.curve("step_seconds")]
    return {
        "phases": [(name, max(0.0, seconds)) for name, seconds in phases],
        "step_seconds": statistics.median(times) if times else None,
        "wall_seconds": whole,
    }


def _timeline(run: Storage) -> TimelineView | None:
    try:
        line = read_timeline(read_events(run))
    except (TypeError, ValueError) as error:
        log.warning("the report of %s lacks the timeline: its events cannot be read: %s", run.url, error)
        return None
    return lay_out_timeline(line) if line is not None and line.seconds > 0 else None


def _artifacts(folder: RunFolder, describe: Describe) -> list[tuple[str, int, Any]]:
    run, known = folder.run, folder.summary.get("exports")
    names = known if isinstance(known, list) else [*run.list_dirs("exports"), *run.list("exports")]

    def explain(name: str) -> Any:
        try:
            return describe(name, run_name=folder.name, recipe=folder.recipe)
        except UserError as error:  # a file of an unknown kind; the report states this
            return {"what": str(error), "uses": []}

    return [
        (name, run.size(f"exports/{name}"), explain(name))
        for name in map(str, names)
        if run.exists(f"exports/{name}")
    ]


def _checkpoints(folder: RunFolder) -> list[tuple[str, int, bool]]:
    run, best = folder.run, folder.summary.get("best_checkpoint")
    measured = {f"step-{int(step):06d}" for step, _ in folder.curve(_best_by(folder))}
    return [
        (name, run.size(f"checkpoints/{name}"), name == best and name in measured)
        for name in sorted(run.list_dirs("checkpoints"))
    ]


def _best_by(folder: RunFolder) -> str:
    validation = folder.recipe.get("validation") or {}
    return str(validation.get("metric_for_best", HELD_OUT))
