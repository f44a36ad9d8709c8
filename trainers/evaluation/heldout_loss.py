"""Measures the held-out loss: the loss on images that are not trained on, at fixed noise and timesteps."""

from __future__ import annotations

import torch

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.plan import Draw
from dreamfleet.datasets.rng import numpy_rng
from dreamfleet.trainers.batches.feed import Preparer, to_samples
from dreamfleet.trainers.batches.image_feed import ImageReader
from dreamfleet.trainers.batches.sources import Shown
from dreamfleet.trainers.batches.vae_encoding import encode_index
from dreamfleet.trainers.config.metrics import HELD_OUT
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.engines.base import Engine
from dreamfleet.trainers.evaluation.eval_mode import eval_mode
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod
from dreamfleet.trainers.methods.image_method import ImageMethod

BATCH = 32  # batch size of a method's own held-out images


class HeldOutLoss:
    """The loss on held-out images, with the same noise and timesteps in every measurement.

    It is comparable between steps, runs and learning rates, unlike the training loss, whose noise differs at every step
    (the idea is from EveryDream2trainer). Each rank measures every ``world``-th image, one at a time, so the mean is
    the same for any number of ranks. ``count`` is the number of evenly spaced timesteps per image.
    """

    def __init__(
        self,
        index: Index,
        *,
        method: DiffusionMethod,
        data: DataConfig,
        count: int,
        distributed: DistributedContext | None = None,
    ):
        self.distributed = distributed = distributed or DistributedContext()
        model, self.method = method.model, method
        self.timesteps = model.even_timesteps(count)
        rows = distributed.share(len(index))
        captions = index.column("caption")
        mine = index.take(rows, [captions[row] for row in rows])
        encoded = distributed.on_every_rank(lambda: encode_index(mine, model, data))
        samples = to_samples(mine)
        self.ids = [sample.id for sample in samples]
        self.latents = [model.scale_latents(mean) for mean in encoded.mean]
        self.masks = encoded.mask or [torch.ones(1, *mean.shape[1:]) for mean in encoded.mean]
        fixed = data.model_copy(update={"caption_dropout": 0.0, "tag_dropout": 0.0, "shuffle_tags": False})
        shown = Shown(mine, data.model_copy(update={"center_crop": True, "random_flip": False}), 0)
        self.time_ids = shown.time_ids([Draw(row, 0) for row in range(len(samples))])
        self.prompts = [method.prompt(s, numpy_rng("holdout", s.id), fixed) for s in samples]

    def measure(self, engine: Engine) -> float:
        """Return the mean loss over images and timesteps, without SNR weights; the same on every rank."""
        mine = self.distributed.on_every_rank(lambda: self._measure_mine(engine))
        return float(torch.stack(self.distributed.collect(mine)).double().mean())

    @torch.no_grad()
    def _measure_mine(self, engine: Engine) -> list[torch.Tensor]:
        """Return the losses ``[count]`` of each image of this rank, on the CPU."""
        losses, count = [], len(self.timesteps)
        prepare = Preparer(self.method)
        with eval_mode(self.method), engine.autocast():
            every = zip(self.ids, self.latents, self.masks, self.time_ids, self.prompts, strict=True)
            for image, latents, mask, time_ids, prompt in every:
                # The noise is drawn again in every measurement: storing it would take count times the memory of the
                # latents.
                keys = [("holdout", 0, j, image) for j in range(count)]
                batch = {
                    "latents": latents.expand(count, -1, -1, -1),
                    "noise": self.method.model.draw_noise(keys, tuple(latents.shape))[0],
                    "mask": mask.expand(count, -1, -1, -1),
                    "timesteps": self.timesteps,
                    "time_ids": time_ids.expand(count, -1),
                    "prompts": [prompt] * count,
                }
                losses.append(self.method.sample_losses(prepare(engine.to_device(batch))))
        return [loss.cpu() for loss in losses]

    def figures(self, engine: Engine) -> dict[str, float]:
        """Return the loss under its key in ``metrics.jsonl``."""
        return {HELD_OUT: self.measure(engine)}


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
