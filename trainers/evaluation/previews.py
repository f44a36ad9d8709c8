"""Preview images of a run: every validation prompt at fixed seeds."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from typing import Any

from PIL import Image

from dreamfleet.datasets.errors import RecipeError, UserError
from dreamfleet.trainers.config.prompt_lines import Shot, shot_of
from dreamfleet.trainers.config.validation import ValidationConfig
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.engines.base import Engine
from dreamfleet.trainers.evaluation.eval_mode import eval_mode
from dreamfleet.trainers.methods.base import Method
from dreamfleet.trainers.models.sampling.draw_shots import draw_shots
from dreamfleet.trainers.models.sampling.prompt_syntax import split_tags
from dreamfleet.trainers.models.sampling.sample import require_size

log = logging.getLogger(__name__)

BATCH = 4  # images generated at once


def default_shot(config: ValidationConfig, resolution: int) -> Shot:
    """Return the sampling options of a preview whose prompt gives none."""
    return Shot(
        "",
        negative_prompt=config.negative_prompt,
        seed=config.seed,
        steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        scheduler=config.scheduler,
        width=resolution,
        height=resolution,
    )


def preview_shots(config: ValidationConfig, resolution: int) -> list[Shot]:
    """Return prompt and sampling options of the first preview of each prompt."""
    default = default_shot(config, resolution)
    return [shot_of(line, default) for line in config.prompts]


def check_previews(method: Method, config: ValidationConfig, resolution: int) -> None:
    """Raise RecipeError for a preview of a size that the model cannot generate."""
    if not config.prompts or method.model.unet is None:
        return
    for number, shot in enumerate(preview_shots(config, resolution), start=1):
        if not config.plain_prompts and (tags := split_tags(shot.prompt)[1]):
            log.warning(
                "validation.prompts: previews ignore <%s:...>; they show the trained weights only",
                tags[0].kind,
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
    """Generate ``num_images`` images of every prompt at fixed seeds; return them on rank 0, with prompt, seed and cell.

    The weights are the method's current ones: within ``engine.evaluate`` the EMA weights. The ranks share the batches,
    which are the same for any number of ranks, so the images are the same too.
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
    batches = [shots[start : start + BATCH] for start in range(0, len(shots), BATCH)]

    def draw(batch: list[Shot]) -> list[Image.Image]:
        return draw_shots(
            method.model, batch, plain=config.plain_prompts, batch_size=BATCH, encode=method.encode
        )

    def draw_mine() -> list[list[Image.Image]]:
        with eval_mode(method), engine.autocast():
            return [draw(batches[number]) for number in distributed.share(len(batches))]

    drawn = distributed.collect(distributed.on_every_rank(draw_mine), everywhere=False)
    return list(itertools.chain.from_iterable(drawn)), cells
