"""Writes the run folder while a run goes on: figures, checkpoints, preview pictures, exports, summary, report."""

from __future__ import annotations

import dataclasses
import io
import logging
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from dreamfleet.datasets.errors import RunFailed
from dreamfleet.datasets.index import Index, build_index
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage import Storage
from dreamfleet.trainers.assemble import Parts
from dreamfleet.trainers.best import BestCheckpoint
from dreamfleet.trainers.checkpoint import Checkpoints, find_not_finite
from dreamfleet.trainers.clock import Clock
from dreamfleet.trainers.encoding import read_pixels
from dreamfleet.trainers.loop import Hooks, diverged
from dreamfleet.trainers.methods.base import Base
from dreamfleet.trainers.methods.exports import Export
from dreamfleet.trainers.methods.seeing import SeeingMethod
from dreamfleet.trainers.metrics import Metrics, logged_figures
from dreamfleet.trainers.place import Place
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.sd.fidelity import MOST_REAL
from dreamfleet.trainers.summary import Summary
from dreamfleet.trainers.validation import (
    HeldOutLoss,
    HeldOutPictures,
    Judge,
    draw_previews,
    wants_judge,
)
from dreamfleet.trainers.versions import versions

log = logging.getLogger(__name__)


class Recorder:
    """Writes the run folder (rank 0) and keeps the other ranks waiting where they must."""

    def __init__(
        self,
        recipe: Recipe,
        parts: Parts,
        place: Place,
        run: Storage,
        checkpoints: Checkpoints,
        start_step: int,
        on_progress: Callable[[dict[str, Any]], None] | None,
        engine_reason: str,
        clock: Clock,
    ):
        self.engine_reason, self.checkpoints, self.clock = engine_reason, checkpoints, clock
        self.recipe, self.parts, self.place, self.run = recipe, parts, place, run
        self.start_step, self.on_progress = start_step, on_progress
        self.saved = start_step or None  # the step of the newest whole checkpoint, the same on every rank
        self.best = BestCheckpoint(
            checkpoints, is_due=lambda step: step == start_step or parts.schedule.saves_at(step)
        )
        self.metrics: Metrics | None = None
        self.held_out: HeldOutLoss | HeldOutPictures | None = None
        self.judge: Judge | None = None
        self.figures: dict[str, float] = {}

    def open(self) -> None:
        """Write recipe and real pictures, measure and draw the untuned model."""
        validation, parts, data = self.recipe.validation, self.parts, self.recipe.data
        if parts.apart is not None and isinstance(parts.method, SeeingMethod):
            self.held_out = HeldOutPictures(parts.apart, method=parts.method, max_pixels=data.max_pixels)
        elif validation.holdout:
            self.held_out = HeldOutLoss(
                validation.holdout,
                method=parts.method,
                data=data,
                count=validation.holdout_timesteps,
                rank=self.place.rank,
                world=self.place.world,
            )
        if self.place.leads:
            if scores := [name for name in validation.metrics if name != "loss" and not validation.prompts]:
                log.warning(
                    "validation.metrics: no %s, as it measures previews; name some validation.prompts",
                    ", ".join(scores),
                )
            head = provenance(self.recipe, self.parts, self.engine_reason)
            self.run.write_text("recipe.yaml", head + self.recipe.to_yaml())
            self.metrics = Metrics(self.run, start_step=self.start_step, report_to=self.recipe.report_to)
            self.best.recall(self.run)
            if self.start_step == 0:
                self._write_real_pictures()
        if self.start_step == 0 and validation.sample_at_first:
            if figures := self.validate(0):
                self.log({"step": 0, **figures})
            self.sample(0)

    def hooks(self, should_stop: Callable[[], bool]) -> Hooks:
        """Return what the loop calls."""
        return Hooks(self.log, self.save, self.sample, self.validate, should_stop, lambda: self.saved)

    def log(self, line: dict[str, Any]) -> None:
        """Write a line of figures."""
        if self.metrics is not None:
            self.metrics.log(line)
            if self.on_progress is not None:
                self.on_progress({**line, "total_steps": self.parts.schedule.total})

    def flush(self) -> None:
        """Bring every line written so far to the run folder."""
        if self.metrics is not None:
            self.metrics.flush()

    def save(self, step: int) -> None:
        """Save a checkpoint; every rank calls, rank 0 writes, all wait until it is whole.

        Raises RunFailed when a step has made weights, averages or the optimizer's moments infinite or NaN: the loss
        would show it only at the next step.
        """
        if step == self.saved:
            return
        # Every rank: an engine that shards gathers here.
        learned, engine = self.parts.engine.learned(), self.parts.engine.state()
        bad = find_not_finite({"learned": learned, "engine": engine}) if self.place.leads else None
        if bad := self.place.told(bad):
            raise RunFailed(diverged(f"{bad} is no longer finite after step {step}", self.saved))
        if self.place.leads:
            self.checkpoints.save(
                step,
                learned=learned,
                engine=engine,
                meta={
                    "method": self.recipe.method.name,
                    "workers": self.place.world,
                    "steps_before": self.parts.method.steps_before,
                    "seconds": self.clock.lap(),
                    **run_identity(self.recipe, self.parts),
                    "versions": versions(),
                },
            )
            self.flush()
        self.saved = step
        self.place.wait()

    def validate(self, step: int) -> dict[str, float]:
        """Measure the held-out images; every rank calls, as the weights may be sharded, rank 0 gets the figures.

        The checkpoint of the lowest held-out loss is kept beside the newest ones: it is saved here when it is not
        due anyway.
        """
        held_out, engine = self.held_out, self.parts.engine
        if held_out is None:
            return {}
        figures = engine.evaluate(lambda: held_out.figures(engine))
        loss = figures["holdout_loss"] if figures and self.place.leads else math.inf
        if self.place.told(step > 0 and self.best.is_beaten_by(loss)):
            before = self.best.replace(loss, step)
            self.save(step)
            if self.place.leads:
                self.best.let_go(before, newest=step)
        return figures if figures and self.place.leads else {}

    def sample(self, step: int) -> None:
        """Draw the preview grid of a step; every rank calls, as the weights may be sharded, rank 0 writes it."""
        from dreamfleet.trainers.sd.sample import picture_grid

        validation = self.recipe.validation
        if not validation.prompts:
            return
        parts, size = self.parts, self.recipe.data.resolution
        drawn = parts.engine.evaluate(lambda: draw_previews(parts.method, parts.engine, validation, size))
        if drawn is None or not self.place.leads:
            return
        pictures, cells = drawn
        if wants_judge(validation):
            figures = self._judge().score(pictures, cells)
            self.figures.update(figures)
            self.log({"step": step, **figures})
        grid = picture_grid(pictures, validation.num_images)
        self._write_picture(f"samples/step-{step:06d}.png", grid)
        lines = [json_text(cell) for cell in cells]
        self.run.write_text(f"samples/step-{step:06d}.jsonl", "\n".join(lines) + "\n")
        if self.metrics is not None:
            self.metrics.log_picture("samples", grid, step)

    def close(self, summary: Summary, step: int) -> None:
        """Export, write the summary and the report on rank 0; every rank calls, as the weights may be gathered."""
        if summary.exit_reason == "completed":
            with self.parts.engine.whole():
                if self.place.leads:
                    summary.exports = self._export(step)
        if not self.place.leads:
            return
        # A run that had nothing left to do measured nothing now: its figures are those that were logged.
        summary.figures = {**logged_figures(self.run), **summary.figures, **self.figures}
        summary.wall_seconds = summary.start_up_seconds + summary.train_seconds + self.clock.since_lap()
        self.run.write_text("summary.json", json_text(dataclasses.asdict(summary), indent=1))
        if self.metrics is not None:
            self.metrics.close()
        from dreamfleet.trainers.report import write_report

        write_report(self.run)

    def _export(self, step: int) -> list[str]:
        with tempfile.TemporaryDirectory(prefix="dreamfleet-export-") as folder:
            paths = self.parts.method.export(
                Export(
                    Path(folder),
                    self.recipe.run_name,
                    formats=self.recipe.train.export_formats or (),
                    step=step,
                    metadata=artefact_metadata(
                        self.recipe,
                        step,
                        dataset_hash=self.parts.sets.instances.content_hash,
                        base=self.parts.method.base,
                    ),
                    precision=self.recipe.train.save_precision,
                )
            )
            for path in paths:
                self.run.upload(path, f"exports/{path.name}")
            return [path.name for path in paths]

    def _write_picture(self, rel: str, picture: Any) -> None:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        self.run.write_bytes(rel, buffer.getvalue())

    def _judge(self) -> Judge:
        if self.judge is None:
            from dreamfleet.trainers.score import words_to_strip

            holdout = self.recipe.validation.holdout
            index = build_index(holdout) if holdout else self.parts.sets.instances
            self.judge = Judge(
                self.recipe.validation, real=self._real_pictures(index), strip=words_to_strip(self.recipe)
            )
        return self.judge

    def _real_pictures(self, index: Index) -> list[Image.Image]:
        arrays = [
            (read_pixels(uri, self.recipe.data).transpose(1, 2, 0) + 1) * 127.5
            for uri in index.column("uri")[:MOST_REAL]
        ]
        return [Image.fromarray(array.round().clip(0, 255).astype("uint8")) for array in arrays]

    def _write_real_pictures(self) -> None:
        from dreamfleet.trainers.sd.sample import picture_grid

        pictures = self._real_pictures(self.parts.sets.instances)[:12]
        self._write_picture("samples/real.png", picture_grid(pictures, min(6, len(pictures))))


def run_identity(recipe: Recipe, parts: Parts) -> dict[str, Any]:
    """Return what must stay the same for a resumed run to equal one that never stopped."""
    return {
        "dataset_hash": parts.sets.instances.content_hash,
        "base_model_hash": parts.method.base.content_hash,
        "global_batch": parts.global_batch,
        "seed": recipe.train.seed,
    }


def provenance(recipe: Recipe, parts: Parts, engine_reason: str) -> str:
    """Return the comment lines on top of a run's recipe.yaml: versions, dataset, base model, why this engine."""
    lines = [f"{name} {number}" for name, number in versions().items()]
    return (
        f"# {', '.join(lines)}\n"
        f"# dataset {parts.sets.instances.content_hash} ({len(parts.sets.instances)} pictures)\n"
        f"# base model {' '.join(filter(None, parts.method.base[:2]))}\n"
        f"# engine {recipe.engine.words} ({' '.join(engine_reason.split())})\n"
    )


def artefact_metadata(recipe: Recipe, step: int, *, dataset_hash: str, base: Base) -> dict[str, str]:
    """Return what is written into every artefact, as strings: recipe, steps, dataset and base model hashes."""
    told = recipe.model_dump(mode="json")
    # Artefacts are passed on, and whose disk the pictures lay on is nobody's business.
    told = _without_folders(told)
    return {
        "dreamfleet_version": versions().get("dreamfleet", "unknown"),
        "dreamfleet_method": recipe.method.name,
        "dreamfleet_step": str(step),
        "dreamfleet_recipe": json_text(told),
        "dreamfleet_dataset_hash": dataset_hash,
        "dreamfleet_base_model": Path(base.name).name,
        "dreamfleet_base_model_hash": base.content_hash,
    }


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    if isinstance(value, str) and (value.startswith("/") or "://" in value):
        return value.rstrip("/").rpartition("/")[2]
    return value
