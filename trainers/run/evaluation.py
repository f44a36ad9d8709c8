"""Computes a run's held-out loss, and generates and scores its preview images."""

from __future__ import annotations

import logging
from typing import Any

from PIL import Image

from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.index.sets import load_held_out
from dreamfleet.datasets.json_text import json_text
from dreamfleet.trainers.batches.vae_encoding import read_pixels
from dreamfleet.trainers.config.metrics import image_metrics
from dreamfleet.trainers.distributed.agreement import share_index
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.evaluation.heldout_loss import HeldOutImages, HeldOutLoss
from dreamfleet.trainers.evaluation.judge import Judge
from dreamfleet.trainers.evaluation.previews import generate_previews
from dreamfleet.trainers.evaluation.score import MOST_REAL, words_to_strip
from dreamfleet.trainers.methods.diffusion_method import require_diffusion
from dreamfleet.trainers.methods.image_method import ImageMethod
from dreamfleet.trainers.run.build import Parts
from dreamfleet.trainers.run.recorder import Recorder

log = logging.getLogger(__name__)


class Evaluation:
    """Held-out loss and preview images of a run: every rank calls :meth:`measure` and :meth:`draw`.

    The work is divided between the ranks, except with an engine in lockstep, whose ranks all do all of it.
    Raises UserError for held-out images that cannot be read.
    """

    def __init__(self, parts: Parts, recorder: Recorder):
        self.parts, self.recorder = parts, recorder
        recipe, distributed = parts.recipe, parts.distributed
        # With an engine in lockstep every rank computes everything.
        self.sharing = DistributedContext(device=distributed.device) if parts.engine.lockstep else distributed
        self.real = parts.sets.instances  # the images that previews are compared with
        self.held_out: HeldOutLoss | HeldOutImages | None = None
        self._judge: Judge | None = None
        validation = recipe.validation
        scores = [name for name in image_metrics() if name in validation.metrics]
        if distributed.is_main and scores and not validation.prompts:
            log.warning("validation.metrics: no %s, as previews need validation.prompts", ", ".join(scores))
        if parts.held_out is not None and isinstance(parts.method, ImageMethod):
            self.held_out = HeldOutImages(
                parts.held_out,
                method=parts.method,
                max_pixels=recipe.data.max_pixels,
                distributed=self.sharing,
            )
        elif folder := validation.holdout:
            self.real = share_index(distributed, lambda: load_held_out(folder, recipe.data))
            self.held_out = HeldOutLoss(
                self.real,
                method=require_diffusion(parts.method, "validation.holdout"),
                data=recipe.data,
                count=validation.holdout_timesteps,
                distributed=self.sharing,
            )

    def write_real_images(self) -> None:
        """Write a grid of up to 12 training images to ``samples/real.png``; rank 0 only."""
        images = self._load_real(self.parts.sets.instances)[:12]
        self.recorder.write_grid("samples/real.png", images, columns=min(6, len(images)))

    def measure(self) -> dict[str, float]:
        """Return the metrics of held-out images, including ``holdout_loss``; {} without such images."""
        held_out, engine = self.held_out, self.parts.engine
        if held_out is None:
            return {}
        return engine.evaluate(lambda: held_out.figures(engine))

    def draw(self, step: int) -> None:
        """Generate the preview images of a step; rank 0 writes their grid and logs their scores."""
        parts, validation = self.parts, self.parts.recipe.validation
        if not validation.prompts:
            return
        images, cells = parts.engine.evaluate(
            lambda: generate_previews(
                require_diffusion(parts.method, "validation.prompts"),
                parts.engine,
                validation,
                parts.recipe.data.resolution,
                distributed=self.sharing,
            )
        )
        parts.distributed.on_rank_0(lambda: self._write_previews(step, images, cells))

    def _write_previews(self, step: int, images: list[Image.Image], cells: list[dict[str, Any]]) -> None:
        validation = self.parts.recipe.validation
        if validation.preview_metrics:
            self.recorder.log_scores(step, self._load_judge().score(images, cells))
        name = f"samples/step-{step:06d}"
        self.recorder.write_grid(f"{name}.png", images, columns=validation.num_images, step=step)
        self.recorder.run.write_text(f"{name}.jsonl", "\n".join(map(json_text, cells)) + "\n")

    def _load_judge(self) -> Judge:
        if self._judge is None:
            recipe = self.parts.recipe
            self._judge = Judge(
                recipe.validation, real=self._load_real(self.real), strip=words_to_strip(recipe)
            )
        return self._judge

    def _load_real(self, index: Index) -> list[Image.Image]:
        arrays = [
            (read_pixels(uri, self.parts.recipe.data).transpose(1, 2, 0) + 1) * 127.5
            for uri in index.column("uri")[:MOST_REAL]
        ]
        return [Image.fromarray(array.round().clip(0, 255).astype("uint8")) for array in arrays]
