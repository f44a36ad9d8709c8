"""Measures the denoising losses of images at fixed noise and timesteps, which are comparable between steps and runs."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.plan import Draw
from dreamfleet.datasets.rng import numpy_rng
from dreamfleet.trainers.batches.feed import Preparer, to_samples
from dreamfleet.trainers.batches.sources import Shown
from dreamfleet.trainers.batches.vae_encoding import encode_index
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.engines.base import Engine
from dreamfleet.trainers.evaluation.eval_mode import eval_mode
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod


class FixedLosses:
    """The losses of N images at ``count`` evenly spaced timesteps, with the same noise in every measurement.

    They are comparable between steps, runs and learning rates, unlike the training loss, whose noise differs at every
    step (the idea is from EveryDream2trainer). Each rank measures every ``world``-th image, one at a time, so the
    losses are the same for any number of ranks. Captions are complete, without dropout; no min-SNR weights.

    ``enlarged``: factor by which the images are enlarged around their centre.
    """

    def __init__(
        self,
        index: Index,
        *,
        method: DiffusionMethod,
        data: DataConfig,
        count: int,
        enlarged: float = 1.0,
        distributed: DistributedContext | None = None,
    ):
        self.distributed = distributed = distributed or DistributedContext()
        model, self.method = method.model, method
        self.timesteps = model.even_timesteps(count)
        rows = distributed.share(len(index))
        captions = index.column("caption")
        mine = index.take(rows, [captions[row] for row in rows])
        encoded = distributed.on_every_rank(lambda: encode_index(mine, model, data, enlarged=enlarged))
        samples = to_samples(mine)
        self.ids = [sample.id for sample in samples]
        self.latents = [model.scale_latents(mean) for mean in encoded.mean]
        self.masks = encoded.mask or [torch.ones(1, *mean.shape[1:]) for mean in encoded.mean]
        fixed = data.model_copy(update={"caption_dropout": 0.0, "tag_dropout": 0.0, "shuffle_tags": False})
        shown = Shown(mine, data.model_copy(update={"center_crop": True, "random_flip": False}), 0)
        self.time_ids = shown.time_ids([Draw(row, 0) for row in range(len(samples))])
        self.prompts = [method.prompt(s, numpy_rng("holdout", s.id), fixed) for s in samples]

    def losses(self, engine: Engine) -> Tensor:
        """Return the losses ``[N, count]`` of all images on the CPU, the same on every rank."""
        mine = self.distributed.on_every_rank(lambda: self._measure_mine(engine))
        return torch.stack(self.distributed.collect(mine)).double()

    @torch.no_grad()
    def _measure_mine(self, engine: Engine) -> list[Tensor]:
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
