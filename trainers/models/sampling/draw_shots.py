"""Draws images from prompts with options, those that are drawn alike in batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from PIL.Image import Image

from dreamfleet.trainers.config.prompt_lines import Shot
from dreamfleet.trainers.models.sampling.sample import generate
from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion


def draw_shots(model: StableDiffusion, shots: Sequence[Shot], **options: Any) -> list[Image]:
    """Draw pictures in order, neighbours that are drawn alike in batches; ``options``: of :func:`sample.generate`."""
    images: list[Image] = []
    for _, group in groupby(shots, key=lambda shot: shot.together):
        alike = list(group)
        first = alike[0]
        images += generate(
            model,
            [shot.prompt for shot in alike],
            seeds=[shot.seed for shot in alike],
            negative_prompt=[shot.negative_prompt for shot in alike],
            steps=first.steps,
            guidance_scale=first.guidance_scale,
            scheduler=first.scheduler,
            width=first.width,
            height=first.height,
            **options,
        )
    return images
