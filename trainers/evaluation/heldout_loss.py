"""Measures the held-out loss: the loss on images that are not trained on, at fixed noise and timesteps."""

from __future__ import annotations

import torch

from dreamfleet.datasets.index.index import Index
from dreamfleet.trainers.batches.image_feed import ImageReader
from dreamfleet.trainers.config.metrics import HELD_OUT
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.engines.base import Engine
from dreamfleet.trainers.engines.passes import Passes
from dreamfleet.trainers.evaluation.eval_mode import eval_mode
from dreamfleet.trainers.evaluation.fixed_losses import FixedLosses
from dreamfleet.trainers.methods.image_method import ImageMethod

BATCH = 32  # batch size of a method's own held-out images


class HeldOutLoss(FixedLosses):
    """The mean loss over held-out images and timesteps."""

    def measure(self, engine: Engine) -> float:
        """Return the mean loss; the same on every rank."""
        return float(self.losses(engine).mean())

    def figures(self, engine: Engine) -> Passes[dict[str, float]]:
        """Return the loss under its key in ``metrics.jsonl``."""
        losses = yield from self.passes(engine)
        return {HELD_OUT: float(losses.mean())}


class HeldOutImages:
    """Measures a method's own held-out images; each rank reads its share of them in every measurement."""

    def __init__(
        self,
        index: Index,
        *,
        method: ImageMethod,
        max_pixels: int,
        distributed: DistributedContext | None = None,
    ):
        self.method, self.distributed = method, distributed or DistributedContext()
        self._read = ImageReader(index, max_pixels=max_pixels)

    def figures(self, engine: Engine) -> dict[str, float]:
        """Return the method's own measurements, including ``holdout_loss``; the same on every rank."""
        measured = self.distributed.collect(
            self.distributed.on_every_rank(lambda: self._measure_mine(engine))
        )
        return self.method.summarise(
            {name: torch.cat([one[name] for one in measured]) for name in measured[0]}
        )

    @torch.no_grad()
    def _measure_mine(self, engine: Engine) -> list[dict[str, torch.Tensor]]:
        """Return the measurements of this rank's batches; the batches are the same for any number of ranks."""
        rows = range(len(self._read))
        batches = [rows[start : start + BATCH] for start in rows[::BATCH]]
        found = []
        with eval_mode(self.method), engine.autocast():
            for number in self.distributed.share(len(batches)):
                batch = self.method.collate([self._read(row) for row in batches[number]])
                found.append(self.method.evaluate(engine.to_device(batch)))
        return [{name: values.cpu() for name, values in one.items()} for one in found]
