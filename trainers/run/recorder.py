"""Writes the run folder while a run goes on: figures, checkpoints, preview pictures, exports, summary, report."""

from __future__ import annotations

import dataclasses
import io
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from dreamfleet.datasets.errors import RunFailed
from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.index.sets import load_held_out
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.batches.vae_encoding import read_pixels
from dreamfleet.trainers.distributed.agreement import share_index
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.evaluation.fidelity import MOST_REAL
from dreamfleet.trainers.evaluation.heldout_loss import (
    HeldOutImages,
    HeldOutLoss,
    Judge,
    draw_previews,
    wants_judge,
)
from dreamfleet.trainers.loop import Hooks, diverged
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.methods.image_method import SeeingMethod
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.report.metrics_log import Metrics, logged_figures
from dreamfleet.trainers.run.best_checkpoint import BestCheckpoint
from dreamfleet.trainers.run.build import Parts
from dreamfleet.trainers.run.checkpoint import Checkpoints, find_not_finite
from dreamfleet.trainers.run.provenance import artifact_metadata, provenance, run_identity
from dreamfleet.trainers.run.stopwatch import Clock
from dreamfleet.trainers.run.summary import Summary
from dreamfleet.trainers.run.versions import versions

log = logging.getLogger(__name__)


class Recorder:
    """Writes the run folder (rank 0) and keeps the other ranks waiting where they must."""

    def __init__(
        self,
        recipe: Recipe,
        parts: Parts,
        distributed: DistributedContext,
        run: Storage,
        checkpoints: Checkpoints,
        start_step: int,
        on_progress: Callable[[dict[str, Any]], None] | None,
        engine_reason: str,
        clock: Clock,
    ):
        self.engine_reason, self.checkpoints, self.clock = engine_reason, checkpoints, clock
        self.recipe, self.parts, self.distributed, self.run = recipe, parts, distributed, run
        # Ranks in lockstep all compute everything.
        self.sharing = DistributedContext(device=distributed.device) if parts.engine.lockstep else distributed
        self.start_step, self.on_progress = start_step, on_progress
        self.saved = start_step or None  # the step of the newest whole checkpoint, the same on every rank
        self.best = BestCheckpoint(
            checkpoints, is_due=lambda step: step == start_step or parts.schedule.saves_at(step)
        )
        self.metrics: Metrics | None = None
        self.held_out: HeldOutLoss | HeldOutImages | None = None
        self.judge: Judge | None = None
        self.real = parts.sets.instances  # images that previews are compared with
        self.figures: dict[str, float] = {}

    def open(self) -> None:
        """Write recipe and real pictures, measure and draw the untuned model."""
        validation, parts, data = self.recipe.validation, self.parts, self.recipe.data
        if parts.apart is not None and isinstance(parts.method, SeeingMethod):
            self.held_out = HeldOutImages(
                parts.apart, method=parts.method, max_pixels=data.max_pixels, distributed=self.sharing
            )
        elif folder := validation.holdout:
            self.real = share_index(self.distributed, lambda: load_held_out(folder, data))
            self.held_out = HeldOutLoss(
                self.real,
                method=parts.method,
                data=data,
                count=validation.holdout_timesteps,
                distributed=self.sharing,
            )
        self.distributed.on_rank_0(self._begin)
        if self.start_step == 0 and validation.sample_at_first:
            if figures := self.validate(0):
                self.log({"step": 0, **figures})
            self.sample(0)

    def _begin(self) -> None:
        """Write the recipe and the real images, and open the metrics."""
        validation = self.recipe.validation
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
            self._write_real_images()

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
        self.distributed.on_rank_0(lambda: self._write_checkpoint(step, learned, engine))
        self.saved = step

    def _write_checkpoint(self, step: int, learned: dict[str, Tensor], engine: dict[str, Any]) -> None:
        """Write a checkpoint, and the metrics up to it."""
        if bad := find_not_finite({"learned": learned, "engine": engine}):
            raise RunFailed(diverged(f"{bad} is no longer finite after step {step}", self.saved))
        self.checkpoints.save(
            step,
            learned=learned,
            engine=engine,
            meta={
                "method": self.recipe.method.name,
                "workers": self.distributed.world,
                "steps_before": self.parts.method.steps_before,
                "seconds": self.clock.lap(),
                **run_identity(self.recipe, self.parts),
                "versions": versions(),
            },
        )
        self.flush()

    def validate(self, step: int) -> dict[str, float]:
        """Measure the held-out images; every rank calls, measures its share, and gets the figures.

        The checkpoint of the lowest held-out loss is kept beside the newest ones: it is saved here when it is not
        due anyway.
        """
        held_out, engine = self.held_out, self.parts.engine
        if held_out is None:
            return {}
        figures = engine.evaluate(lambda: held_out.figures(engine))
        loss = figures["holdout_loss"]
        if self.distributed.broadcast(step > 0 and self.best.is_beaten_by(loss)):
            before = self.best.replace(loss, step)
            self.save(step)
            self.distributed.on_rank_0(lambda: self.best.let_go(before, newest=step))
        return figures

    def sample(self, step: int) -> None:
        """Draw the preview grid of a step; every rank calls and draws its share, rank 0 writes it."""
        validation = self.recipe.validation
        if not validation.prompts:
            return
        parts, size = self.parts, self.recipe.data.resolution
        images, cells = parts.engine.evaluate(
            lambda: draw_previews(parts.method, parts.engine, validation, size, distributed=self.sharing)
        )
        self.distributed.on_rank_0(lambda: self._write_previews(step, images, cells))

    def _write_previews(self, step: int, images: list[Image.Image], cells: list[dict[str, Any]]) -> None:
        """Score previews where that is wanted, and write them."""
        from dreamfleet.trainers.models.sampling.sample import image_grid

        validation = self.recipe.validation
        if wants_judge(validation):
            figures = self._judge().score(images, cells)
            self.figures.update(figures)
            self.log({"step": step, **figures})
        grid = image_grid(images, validation.num_images)
        self._write_image(f"samples/step-{step:06d}.png", grid)
        lines = [json_text(cell) for cell in cells]
        self.run.write_text(f"samples/step-{step:06d}.jsonl", "\n".join(lines) + "\n")
        if self.metrics is not None:
            self.metrics.log_image("samples", grid, step)

    def close(self, summary: Summary, step: int) -> None:
        """Export, write the summary and the report on rank 0; every rank calls, as the weights may be gathered."""
        if summary.exit_reason == "completed":
            with self.parts.engine.whole():
                summary.exports = self.distributed.on_rank_0(lambda: self._export(step))
        self.distributed.on_rank_0(lambda: self._close(summary))

    def _close(self, summary: Summary) -> None:
        """Write the summary and the report."""
        from dreamfleet.trainers.report.report import write_report

        # A run that had nothing left to do measured nothing now: its figures are those that were logged.
        summary.figures = {**logged_figures(self.run), **summary.figures, **self.figures}
        summary.wall_seconds = summary.start_up_seconds + summary.train_seconds + self.clock.since_lap()
        self.run.write_text("summary.json", json_text(dataclasses.asdict(summary), indent=1))
        if self.metrics is not None:
            self.metrics.close()
        write_report(self.run)

    def _export(self, step: int) -> list[str]:
        with tempfile.TemporaryDirectory(prefix="dreamfleet-export-") as folder:
            paths = self.parts.method.export(
                Export(
                    Path(folder),
                    self.recipe.run_name,
                    formats=self.recipe.train.export_formats or (),
                    step=step,
                    metadata=artifact_metadata(
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

    def _write_image(self, rel: str, image: Any) -> None:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        self.run.write_bytes(rel, buffer.getvalue())

    def _judge(self) -> Judge:
        if self.judge is None:
            from dreamfleet.trainers.evaluation.score import words_to_strip

            real = self._real_images(self.real)
            self.judge = Judge(self.recipe.validation, real=real, strip=words_to_strip(self.recipe))
        return self.judge

    def _real_images(self, index: Index) -> list[Image.Image]:
        arrays = [
            (read_pixels(uri, self.recipe.data).transpose(1, 2, 0) + 1) * 127.5
            for uri in index.column("uri")[:MOST_REAL]
        ]
        return [Image.fromarray(array.round().clip(0, 255).astype("uint8")) for array in arrays]

    def _write_real_images(self) -> None:
        from dreamfleet.trainers.models.sampling.sample import image_grid

        images = self._real_images(self.parts.sets.instances)[:12]
        self._write_image("samples/real.png", image_grid(images, min(6, len(images))))
