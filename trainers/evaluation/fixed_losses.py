"""Measures the denoising losses of images at fixed noise and timesteps, which are comparable between steps and runs."""

from __future__ import annotations

from typing import NamedTuple

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
from dreamfleet.trainers.engines.model_passes import Measurement
from dreamfleet.trainers.engines.passes import Passes, drive
from dreamfleet.trainers.evaluation.eval_mode import eval_mode
from dreamfleet.trainers.methods.base import Batch
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod


class _Image(NamedTuple):
    """One encoded image: its ID, scaled latents ``[C, h, w]``, loss weights ``[1, h, w]``, time IDs and prompt."""

    id: str
    latents: Tensor
    mask: Tensor
    time_ids: Tensor
    prompt: str


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
        self.distributed = distributed or DistributedContext()
        self.index, self.data, self.method, self.enlarged = index, data, method, enlarged
        self.timesteps = method.model.even_timesteps(count)
        self._images: dict[int, _Image] = {}
        self.distributed.on_every_rank(self._encode_mine)

    def _encode_mine(self) -> list[_Image]:
        """Return the images of this rank's share, and encode those that it has not had yet."""
        rows = self.distributed.share(len(self.index))
        if missing := [row for row in rows if row not in self._images]:
            captions, model, data = self.index.column("caption"), self.method.model, self.data
            mine = self.index.take(missing, [captions[row] for row in missing])
            encoded = encode_index(mine, model, data, enlarged=self.enlarged)
            fixed = data.model_copy(
                update={"caption_dropout": 0.0, "tag_dropout": 0.0, "shuffle_tags": False}
            )
            shown = Shown(mine, data.model_copy(update={"center_crop": True, "random_flip": False}), 0)
            time_ids = shown.time_ids([Draw(row, 0) for row in range(len(missing))])
            masks = encoded.mask or [torch.ones(1, *mean.shape[1:]) for mean in encoded.mean]
            for number, (row, sample) in enumerate(zip(missing, to_samples(mine), strict=True)):
                prompt = self.method.prompt(sample, numpy_rng("holdout", sample.id), fixed)
                latents = model.scale_latents(encoded.mean[number])
                self._images[row] = _Image(sample.id, latents, masks[number], time_ids[number], prompt)
        return [self._images[row] for row in rows]

    def losses(self, engine: Engine) -> Tensor:
        """Return the losses ``[N, count]`` of all images on the CPU, the same on every rank."""
        return drive(self.passes(engine))

    def passes(self, engine: Engine) -> Passes[Tensor]:
        """Return what :meth:`losses` returns; the passes may be computed together with those of other trainings."""
        mine = yield from self.distributed.generate_on_every_rank(self._measure_mine(engine))
        return torch.stack(self.distributed.collect(mine)).double()

    def _measure_mine(self, engine: Engine) -> Passes[list[Tensor]]:
        """Return the losses ``[count]`` of each image of this rank, on the CPU."""
        losses = list[Tensor]()
        prepare, images = Preparer(self.method), self._encode_mine()
        with eval_mode(self.method):  # of this training's own modules: others may train while it waits
            for image in images:
                with torch.no_grad(), engine.autocast():
                    batch = prepare(engine.to_device(self._batch(image)))
                losses.append((yield Measurement(engine, batch)))
        return [loss.cpu() for loss in losses]

    def _batch(self, image: _Image) -> Batch:
        """Return the batch of an image at all timesteps.

        The noise is drawn again in every measurement: storing it would take ``count`` times the memory of the latents.
        """
        count = len(self.timesteps)
        keys = [("holdout", 0, j, image.id) for j in range(count)]
        sizes = {"time_ids": image.time_ids.expand(count, -1)} if self.method.model.uses_time_ids else {}
        return {
            **sizes,
            "latents": image.latents.expand(count, -1, -1, -1),
            "noise": self.method.model.draw_noise(keys, tuple(image.latents.shape))[0],
            "mask": image.mask.expand(count, -1, -1, -1),
            "timesteps": self.timesteps,
            "prompts": [image.prompt] * count,
        }
