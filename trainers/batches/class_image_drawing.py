"""Generates class images for prior preservation with the untuned model; runs with the same key share them."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dreamfleet.datasets.rng import key
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.image_request import ImageRequest
from dreamfleet.trainers.models.sampling.sample import generate

if TYPE_CHECKING:
    from dreamfleet.trainers.models.family import DiffusionModel


def generated_name(number: int) -> str:
    """Return the file name of a generated class image."""
    return f"{number:06d}.png"


def class_image_key(content_hash: str, request: ImageRequest) -> str:
    """Return the folder name for the images of a request: readable, and different if the images would differ.

    ``content_hash``: of the model that generates them. ``request``: with the seed of the whole set.
    """
    shaped_by = [
        content_hash,
        request.prompt,
        request.seed,
        request.steps,
        float(request.guidance_scale),
        request.width,
        request.scheduler,
    ]
    digest = hashlib.sha256(json.dumps(shaped_by, ensure_ascii=False).encode()).hexdigest()[:12]
    words = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")[:40].rstrip("-")
    return f"{words or 'class'}-{digest}"


def generate_class_images(
    model: DiffusionModel,
    request: ImageRequest,
    *,
    numbers: Sequence[int],
    storage: Storage,
    batch_size: int = 4,
) -> None:
    """Generate images of ``request`` into ``storage``; image i is ``{i:06d}.png`` and has its own seed.

    ``request``: with the seed of the whole set. ``numbers``: of the images to generate.
    """
    # Consecutive seeds: a CPU generator keeps 32 bits of a seed, so hashed seeds could collide.
    first_seed = key("class image", request.seed) % 2**31
    for start in range(0, len(numbers), batch_size):
        part = numbers[start : start + batch_size]
        images = generate(
            model, [replace(request, seed=first_seed + number) for number in part], batch_size=len(part)
        )
        for number, image in zip(part, images, strict=True):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            storage.write_bytes(generated_name(number), buffer.getvalue())
