"""Turns the draws of the batch plan into batches of latents, prompts, keyed noise and timesteps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dreamfleet.datasets.captions import NoCaption
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.index.index import BadFile, Index
from dreamfleet.datasets.plan import Draw
from dreamfleet.datasets.rng import numpy_rng
from dreamfleet.trainers.batches.plan_share import PlanShare, prepare_ahead
from dreamfleet.trainers.batches.sources import FollowsPlan, Images, ResidentLatents
from dreamfleet.trainers.config.noise import NoiseConfig
from dreamfleet.trainers.distributed.device import copy_to_device
from dreamfleet.trainers.methods.base import Batch, Sample
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod
from dreamfleet.trainers.models.condition import Condition
from dreamfleet.trainers.models.keyed_noise import keyed_normal, perturb_input

# Bytes of cached encoded prompts on the device: about 4,500 prompts of SD 1.x in 16 bits, 1,700 of SDXL.
REMEMBERED = 512 * 2**20
WORDLESS_TOLD = 10  # maximum of images without a prompt that one message names


class Feed:
    """The batches of one worker.

    Everything random about a draw (noise, timestep, latent sample, prompt, crop, flip) is keyed by (seed, epoch,
    image id), so it is the same on any number of workers and after any resume.
    """

    def __init__(
        self,
        share: PlanShare,
        *,
        instances: Index,
        images: Images,
        method: DiffusionMethod,
        data: DataConfig,
        noise: NoiseConfig | None = None,
        classes: Index | None = None,
        class_images: Images | None = None,
    ):
        self.share, self.plan, self.method = share, share.plan, method
        self.data, self.noise = data, noise or NoiseConfig()
        method.model.timestep_draw(self.noise)  # raises for limits that the model does not have
        self._halves = [(to_samples(instances), images)]
        if classes is not None and class_images is not None:
            self._halves.append((to_samples(classes), class_images))
        for samples, _ in self._halves:
            check_words(samples, method, data)  # before training, not at the step that uses such an image

    def batch(self, step: int, unit: int = 0) -> Batch:
        """Return the batch of one unit of a step, on the CPU: instance rows first, then their class images.

        It has ``latents, noise [N, C, h, w]``, ``timesteps [N]``, ``weights [N]``, ``prompts`` and
        ``num_instances``; with ``data.alpha_mask`` also ``mask [N, 1, h, w]``, for SDXL ``time_ids [N, 6]``.
        If the images are not encoded yet, ``pixels [N, 3, H, W]`` and ``latent_noise [N, C, h, w]`` replace
        the latents.
        """
        parts, keys, prompts, num_instances = [], [], [], 0
        for half, (samples, images) in enumerate(self._halves):
            draws = self.share.draws(step, unit, classes=half > 0)
            num_instances = num_instances or len(draws)
            keys += [self._key(samples[draw.row], draw) for draw in draws]
            part = images.take(draws)
            rows = part.pop("rows").tolist() if "rows" in part else [draw.row for draw in draws]
            prompts += [self._prompt(samples[row], draw) for row, draw in zip(rows, draws, strict=True)]
            if self.method.model.uses_time_ids:
                part["time_ids"] = images.shown.time_ids(draws, rows)
            parts.append(part)
        batch: Batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if "mean" in batch:
            shape = tuple(batch["mean"].shape[1:])
            batch["latents"] = self._sample_latents(batch.pop("mean"), batch.pop("std"), keys)
        else:
            shape = self.method.model.latent_shape(*batch["pixels"].shape[2:])
            batch["latent_noise"] = self._latent_noise(keys, shape)
        batch["noise"], batch["timesteps"] = self.method.model.draw_noise(keys, shape, self.noise)
        if (perturbed := perturb_input(batch["noise"], keys, self.noise)) is not None:
            batch["input_noise"] = perturbed
        weights = torch.ones(len(keys))
        if self.method.prior is not None:
            weights[num_instances:] = self.method.prior.loss_weight
        return {**batch, "weights": weights, "prompts": prompts, "num_instances": num_instances}

    def stream(self, start_step: int, stop_step: int | None = None, *, ahead: int = 4) -> Iterator[Batch]:
        """Yield this worker's batches of the steps ``start_step`` to ``stop_step`` (None: endless).

        Unless all latents are resident, a thread prepares up to ``ahead`` batches in advance.
        """
        for half, (_, images) in enumerate(self._halves):
            if isinstance(images, FollowsPlan):
                images.follow(self.share.all_draws(start_step, stop_step, classes=half > 0))
        positions = self.share.positions(start_step, stop_step)
        if all(isinstance(images, ResidentLatents) for _, images in self._halves):
            # A batch takes 0.2 ms, so a thread gains nothing. On a machine with few cores, a second thread
            # makes OpenMP put its own threads to sleep between operations (measured: 212 ms per step
            # instead of 101).
            yield from (self.batch(*position) for position in positions)
            return
        yield from prepare_ahead(self.batch, positions, ahead=ahead, close=self._close_streams)

    @property
    def bad(self) -> list[BadFile]:
        """Images that this rank could not decode so far."""
        return [bad for images in self._streams() for bad in images.bad]

    @property
    def waits(self) -> dict[str, float]:
        """Seconds that this rank has waited for streamed images, by cause; {} if none are streamed."""
        waits: dict[str, float] = {}
        for images in self._streams():
            for cause, seconds in images.waits.items():
                waits[cause] = waits.get(cause, 0.0) + seconds
        return waits

    def _streams(self) -> list[FollowsPlan]:
        return [images for _, images in self._halves if isinstance(images, FollowsPlan)]

    def _close_streams(self) -> None:
        for images in self._streams():
            images.close()

    def _key(self, sample: Sample, draw: Draw) -> tuple[int | str, ...]:
        return (sample.role, self.plan.seed, draw.epoch, sample.id)

    def _prompt(self, sample: Sample, draw: Draw) -> str:
        options = self.method.options_of(sample, self.data)
        return self.method.prompt(sample, numpy_rng("prompt", *self._key(sample, draw)), options)

    def _latent_noise(self, keys: Sequence[tuple[int | str, ...]], shape: tuple[int, ...]) -> Tensor:
        how = self.data.latent_sampling
        if how == "deterministic":
            return torch.zeros(len(keys), *shape)
        chosen = [(k[0], k[1], 0, k[3]) for k in keys] if how == "once" else keys
        return torch.stack([keyed_normal(shape, "latent", *parts) for parts in chosen])

    def _sample_latents(self, mean: Tensor, std: Tensor, keys: Sequence[tuple[int | str, ...]]) -> Tensor:
        return self.method.model.scale_latents(mean + std * self._latent_noise(keys, tuple(mean.shape[1:])))


class Preparer:
    """Completes a batch on the device: encodes pixels without cached latents, and prompts.

    Encoded prompts are cached while the text encoder is frozen; beyond ``memory`` bytes the least recently
    used are dropped.
    """

    def __init__(self, method: DiffusionMethod, *, memory: int = REMEMBERED):
        self.method, self.memory = method, memory
        self._conditions: OrderedDict[str, Condition] = OrderedDict()
        self._held = 0

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with ``latents``, and with ``input_ids`` or encoded prompts.

        ``input_ids`` if the text encoder or its input is trained, else ``context`` (for SDXL also
        ``pooled``).
        """
        batch = dict(batch)
        device = batch["noise"].device
        if "pixels" in batch:
            mean, std = self.method.model.encode_images(batch.pop("pixels"))
            batch["latents"] = self.method.model.scale_latents(mean + std * batch.pop("latent_noise"))
        prompts = batch.pop("prompts")
        if self.method.trains_text:
            batch["input_ids"] = copy_to_device(self.method.tokenize(prompts), device)
        else:
            batch |= self._encode(prompts).entries()
        return batch

    def _encode(self, prompts: Sequence[str]) -> Condition:
        for prompt in prompts:
            if prompt in self._conditions:
                self._conditions.move_to_end(prompt)
        if missing := list(dict.fromkeys(p for p in prompts if p not in self._conditions)):
            for prompt, found in zip(missing, self.method.encode(missing).rows(), strict=True):
                self._conditions[prompt] = found.map(torch.clone)  # a view would keep the whole batch
                self._held += found.num_bytes
        conditions = Condition.cat([self._conditions[prompt] for prompt in prompts])
        while self._held > self.memory:
            self._held -= self._conditions.popitem(last=False)[1].num_bytes
        return conditions


def check_words(samples: Sequence[Sample], method: DiffusionMethod, data: DataConfig) -> None:
    """Raise NoCaption if the method finds no prompt for some images; it counts all of them and names some."""
    wordless, reason = [], ""
    for sample in samples:
        own = method.options_of(sample, data)
        if sample.caption is None or not own.use_captions:
            try:
                kept = own.model_copy(update={"caption_dropout": 0.0})
                method.prompt(sample, numpy_rng("prompt", sample.id), kept)
            except NoCaption as error:
                wordless.append(sample.uri)
                reason = reason or str(error)
    if len(wordless) == 1:
        raise NoCaption(reason)
    if wordless:
        more = f", and {len(wordless) - WORDLESS_TOLD} more" if len(wordless) > WORDLESS_TOLD else ""
        raise NoCaption(
            f"{reason}\n  {len(wordless)} such images: {', '.join(wordless[:WORDLESS_TOLD])}{more}"
        )


def to_samples(index: Index) -> Sequence[Sample]:
    """Return the rows of an index as samples, from which methods make prompts; each is made when it is used."""
    return index.lazily(("id", "caption", "concept", "role", "uri"), Sample)
