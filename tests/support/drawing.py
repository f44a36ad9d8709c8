"""Generates images from prompts, seeds and shared options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from dreamfleet.trainers.config.image_request import ImageRequest
from dreamfleet.trainers.models.sampling import sample


def generate(
    model: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    negative_prompt: str | Sequence[str] = "",
    batch_size: int = 4,
    encode: Any = None,
    **options: Any,
) -> list[Image.Image]:
    """Generate one image per prompt and seed; ``negative_prompt`` is one text for all images, or one per image."""
    negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
    requests = [
        ImageRequest(prompt, negative, seed, **options)
        for prompt, negative, seed in zip(prompts, negatives, seeds, strict=True)
    ]
    return sample.generate(model, requests, batch_size=batch_size, encode=encode)
