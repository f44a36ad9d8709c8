"""The ``validation:`` section: held-out loss at fixed noise and timesteps, and preview pictures at fixed seeds."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import RecipeError, ResourceError, UserError
from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.plan import Draw
from dreamfleet.datasets.rng import numpy_rng
from dreamfleet.trainers.batches.feed import Preparer, to_samples
from dreamfleet.trainers.batches.image_feed import ImageReader
from dreamfleet.trainers.batches.sources import Shown
from dreamfleet.trainers.batches.vae_encoding import encode_index
from dreamfleet.trainers.config.prompt_lines import Shot, shot_of
from dreamfleet.trainers.config.validation import ValidationConfig
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.engines.base import Engine
from dreamfleet.trainers.methods.base import Method
from dreamfleet.trainers.methods.image_method import SeeingMethod
from dreamfleet.trainers.models.sampling.draw_shots import draw_shots
from dreamfleet.trainers.models.sampling.prompt_syntax import split_tags, words_alone
from dreamfleet.trainers.models.stable_diffusion.noise import draw_noise

log = logging.getLogger(__name__)

HELD_OUT_BATCH = 32  # images that are measured at once
DRAWN_AT_ONCE = 4  # previews


class HeldOutLoss:
    """The loss on images the run never trains on, with the same noise and timesteps every time it is measured.

    Comparable between steps, runs and learning rates, unlike the training loss, whose noise differs at every step.
    The idea is EveryDream2trainer's validation. Each rank measures every ``world``-th image by itself, so the mean is
    the same on any number of ranks.
    """

    def __init__(
        self,
        index: Index,
        *,
        method: Method,
        data: DataConfig,
        count: int,
        distributed: DistributedContext | None = None,
    ):
        self.distributed = distributed = distributed or DistributedContext()
        model, self.method = method.model, method
        total = model.scheduler.config.num_train_timesteps
        self.timesteps = torch.tensor([int((j + 0.5) * total / count) for j in range(count)])
        rows = distributed.share(len(index))
        captions = index.column("caption")
        mine = index.take(rows, [captions[row] for row in rows])
        encoded = distributed.on_every_rank(lambda: encode_index(mine, model, data))
        samples = to_samples(mine)
        self.ids = [sample.id for sample in samples]
        self.latents = [mean * model.vae.config.scaling_factor for mean in encoded.mean]
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
        """Return the losses ``[count]`` of each of this rank's images, on the CPU."""
        losses, count = [], len(self.timesteps)
        prepare = Preparer(self.method)
        with evaluating(self.method), engine.autocast():
            every = zip(self.ids, self.latents, self.masks, self.time_ids, self.prompts, strict=True)
            for image, latents, mask, time_ids, prompt in every:
                # Drawn each time, the same from its key: kept, it would take as much as all latents, times count.
                keys = [("holdout", 0, j, image) for j in range(count)]
                batch = {
                    "latents": latents.expand(count, -1, -1, -1),
                    "noise": draw_noise(keys, tuple(latents.shape), num_timesteps=1)[0],
                    "mask": mask.expand(count, -1, -1, -1),
                    "timesteps": self.timesteps,
                    "time_ids": time_ids.expand(count, -1),
                    "prompts": [prompt] * count,
                }
                losses.append(self.method.sample_losses(prepare(engine.to_device(batch))))
        return [loss.cpu() for loss in losses]

    def figures(self, engine: Engine) -> dict[str, float]:
        """Return the loss by its name in the figures."""
        return {"holdout_loss": self.measure(engine)}


class HeldOutImages:
    """The images that a method set apart itself, measured its own way; read anew each time, by each rank its share."""

    def __init__(
        self,
        index: Index,
        *,
        method: SeeingMethod,
        max_pixels: int,
        distributed: DistributedContext | None = None,
    ):
        self.method, self.distributed = method, distributed or DistributedContext()
        self._read = ImageReader(index, max_pixels=max_pixels)

    def figures(self, engine: Engine) -> dict[str, float]:
        """Return the method's figures of its images, ``holdout_loss`` among them; the same on every rank."""
        measured = self.distributed.collect(
            self.distributed.on_every_rank(lambda: self._measure_mine(engine))
        )
        return self.method.summarise(
            {name: torch.cat([one[name] for one in measured]) for name in measured[0]}
        )

    @torch.no_grad()
    def _measure_mine(self, engine: Engine) -> list[dict[str, torch.Tensor]]:
        """Return what was measured in each of this rank's batches, which are the same for any number of ranks."""
        rows = range(len(self._read))
        batches = [rows[start : start + HELD_OUT_BATCH] for start in rows[::HELD_OUT_BATCH]]
        found = []
        with evaluating(self.method), engine.autocast():
            for number in self.distributed.share(len(batches)):
                batch = self.method.see([self._read(row) for row in batches[number]])
                found.append(self.method.examine(engine.to_device(batch)))
        return [{name: values.cpu() for name, values in one.items()} for one in found]


def preview_shots(config: ValidationConfig, resolution: int) -> list[Shot]:
    """Return what the first picture of each prompt is drawn from and how."""
    usual = Shot(
        "",
        negative_prompt=config.negative_prompt,
        seed=config.seed,
        steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        scheduler=config.scheduler,
        width=resolution,
        height=resolution,
    )
    return [shot_of(line, usual) for line in config.prompts]


def check_previews(method: Method, config: ValidationConfig, resolution: int) -> None:
    """Raise RecipeError for a preview of a size that the model cannot draw, before hours of training."""
    from dreamfleet.trainers.models.sampling.sample import require_size

    if not config.prompts or method.model.unet is None:
        return
    for number, shot in enumerate(preview_shots(config, resolution), start=1):
        if not config.plain_prompts and (tags := split_tags(shot.prompt)[1]):
            log.warning(
                "validation.prompts: previews leave out <%s:...>; they show what is trained", tags[0].kind
            )
        try:
            require_size(method.model, shot.width or resolution, shot.height or resolution)
        except UserError as error:
            raise RecipeError(f"validation.prompts, prompt {number} ({shot.prompt}): {error}") from error


def draw_previews(
    method: Method,
    engine: Engine,
    config: ValidationConfig,
    resolution: int,
    *,
    distributed: DistributedContext | None = None,
) -> tuple[list[Image.Image], list[dict[str, Any]]]:
    """Draw ``num_images`` images of every prompt at fixed seeds; rank 0 gets them, with prompt, seed and cell of each.

    The weights are those the method holds: within ``engine.evaluate`` the averaged ones. Every rank draws some of the
    batches, which are the same for any number of ranks, so the images are too.
    """
    distributed = distributed or DistributedContext()
    shots: list[Shot] = []
    cells: list[dict[str, Any]] = []
    for row, shot in enumerate(preview_shots(config, resolution)):
        for column in range(config.num_images):
            shots.append(replace(shot, seed=shot.seed + column))
            sides = {"width": shot.width, "height": shot.height}
            cells.append(
                {"prompt": shot.prompt, "seed": shots[-1].seed, "row": row, "column": column, **sides}
            )
    batches = [shots[start : start + DRAWN_AT_ONCE] for start in range(0, len(shots), DRAWN_AT_ONCE)]

    def draw(batch: list[Shot]) -> list[Image.Image]:
        return draw_shots(
            method.model, batch, plain=config.plain_prompts, batch_size=DRAWN_AT_ONCE, encode=method.encode
        )

    def draw_mine() -> list[list[Image.Image]]:
        with evaluating(method), engine.autocast():
            return [draw(batches[number]) for number in distributed.share(len(batches))]

    drawn = distributed.collect(distributed.on_every_rank(draw_mine), everywhere=False)
    return list(itertools.chain.from_iterable(drawn)), cells


@contextmanager
def evaluating(method: Method) -> Iterator[None]:
    """Within this context the method and its model are in eval mode: nothing is dropped out."""
    parts = [method, *method.model.modules().values()]
    # Of every module: dropout and gradient checkpointing may be on in some layers of a part alone.
    modes = {module: module.training for part in parts for module in part.modules()}
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class Judge:
    """Scores previews while a run goes on: CLIP-I and DINO against real pictures, CLIP-T against the prompts."""

    def __init__(self, config: ValidationConfig, *, real: list[Image.Image], strip: Mapping[str, str]):
        from dreamfleet.trainers.models.vision.clip import load_clip
        from dreamfleet.trainers.models.vision.dino import load_dino

        if "dino" in config.metrics and not config.dino:
            raise ResourceError("validation.metrics: dino needs validation.dino, the folder of a DINO ViT")
        self.config, self.real, self.strip = config, real, strip
        self.clip = load_clip(config.clip)
        self.dino = load_dino(config.dino) if config.dino and "dino" in config.metrics else None

    def score(self, images: list[Image.Image], cells: list[dict[str, Any]]) -> dict[str, float]:
        """Add its scores to every cell and return their means."""
        from dreamfleet.trainers.evaluation.fidelity import score_images

        scores = score_images(
            images,
            prompts=[
                cell["prompt"] if self.config.plain_prompts else words_alone(cell["prompt"]) for cell in cells
            ],
            real=self.real,
            clip=self.clip,
            dino=self.dino,
            strip=self.strip,
        )
        wanted = [name for name in ("clip_i", "clip_t", "dino") if name in self.config.metrics]
        for cell, found in zip(cells, scores.pictures, strict=True):
            cell["scores"] = {name: round(found[name], 4) for name in wanted}
        return {name: getattr(scores, name) for name in wanted}
