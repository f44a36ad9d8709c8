"""Generates the preview images of a run: every validation prompt at fixed seeds."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from dreamfleet.datasets.errors import RecipeError, UserError
from dreamfleet.trainers.config.image_request import ImageRequest
from dreamfleet.trainers.config.prompt_lines import parse_prompt_line
from dreamfleet.trainers.config.validation import ValidationConfig
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.engines.base import Engine
from dreamfleet.trainers.evaluation.eval_mode import eval_mode
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod
from dreamfleet.trainers.models.sampling.prompt_syntax import split_tags
from dreamfleet.trainers.models.sampling.sample import generate, require_size

log = logging.getLogger(__name__)

BATCH = 4  # images generated at once


def default_request(config: ValidationConfig, resolution: int) -> ImageRequest:
    """Return the default sampling options of previews, which options in a prompt override."""
    return ImageRequest(
        negative_prompt=config.negative_prompt,
        seed=config.seed,
        steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        scheduler=config.scheduler,
        width=resolution,
        height=resolution,
        plain=config.plain_prompts,
    )


def preview_requests(config: ValidationConfig, resolution: int) -> list[ImageRequest]:
    """Return the request for the first preview of each prompt."""
    default = default_request(config, resolution)
    return [parse_prompt_line(line, default) for line in config.prompts]


def check_previews(method: DiffusionMethod, config: ValidationConfig, resolution: int) -> None:
    """Raise RecipeError for a preview of a size that the model cannot generate."""
    if not config.prompts or method.model.denoiser is None:
        return
    for number, request in enumerate(preview_requests(config, resolution), start=1):
        if not config.plain_prompts and (tags := split_tags(request.prompt)[1]):
            log.warning(
                "validation.prompts: previews ignore <%s:...>; they show the trained weights only",
                tags[0].kind,
            )
        try:
            require_size(method.model, request.width or resolution, request.height or resolution)
        except UserError as error:
            raise RecipeError(f"validation.prompts, prompt {number} ({request.prompt}): {error}") from error


def class_requests(config: ValidationConfig, resolution: int, prompts: Sequence[str]) -> list[ImageRequest]:
    """Return ``num_images`` requests for each class prompt, which is literal text, with the previews' options."""
    default = replace(default_request(config, resolution), plain=True)
    firsts = [replace(default, prompt=prompt) for prompt in dict.fromkeys(prompts)]
    return [request for first in firsts for request in first.columns(config.num_images)]


def preview_cells(
    config: ValidationConfig, resolution: int
) -> tuple[list[ImageRequest], list[dict[str, Any]]]:
    """Return the requests of all previews in order, and the prompt, seed and cell in the grid of each."""
    rows = [first.columns(config.num_images) for first in preview_requests(config, resolution)]
    cells = [
        {
            "prompt": request.prompt,
            "seed": request.seed,
            "row": row,
            "column": column,
            "width": request.width,
            "height": request.height,
        }
        for row, columns in enumerate(rows)
        for column, request in enumerate(columns)
    ]
    return list(itertools.chain.from_iterable(rows)), cells


def generate_previews(
    method: DiffusionMethod,
    engine: Engine,
    config: ValidationConfig,
    resolution: int,
    *,
    distributed: DistributedContext | None = None,
) -> tuple[list[Image.Image], list[dict[str, Any]]]:
    """Generate ``num_images`` images of every prompt at fixed seeds; return them on rank 0, with prompt, seed and cell.

    The weights are the method's current ones: within ``engine.evaluate`` the EMA weights.
    """
    requests, cells = preview_cells(config, resolution)
    return generate_shared(method, engine, requests, distributed=distributed), cells


def generate_shared(
    method: DiffusionMethod,
    engine: Engine,
    requests: Sequence[ImageRequest],
    *,
    distributed: DistributedContext | None = None,
) -> list[Image.Image]:
    """Generate an image for each request with the method's current weights; return them on rank 0.

    The ranks share the batches, which are the same for any number of ranks, so the images are the same too.
    """
    distributed = distributed or DistributedContext()
    batches = [requests[start : start + BATCH] for start in range(0, len(requests), BATCH)]

    def generate_share() -> list[list[Image.Image]]:
        with eval_mode(method), engine.autocast():
            return [
                generate(method.model, batches[number], batch_size=BATCH, encode=method.encode)
                for number in distributed.share(len(batches))
            ]

    images = distributed.collect(distributed.on_every_rank(generate_share), everywhere=False)
    return list(itertools.chain.from_iterable(images))
