"""Class pictures for prior preservation: drawn once by the untuned model, shared by every run with the same key."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dreamfleet.datasets.rng import key
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.models.sampling.sample import generate

if TYPE_CHECKING:
    from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion


def generated_name(number: int) -> str:
    """Return the file name of a generated class image."""
    return f"{number:06d}.png"


def class_image_key(
    content_hash: str,
    prompt: str,
    *,
    seed: int,
    steps: int,
    guidance_scale: float,
    resolution: int,
    scheduler: str = "ddim",
) -> str:
    """Name the folder for pictures of `prompt`: readable, and different whenever what shapes them differs."""
    shaped_by = [content_hash, prompt, seed, steps, float(guidance_scale), resolution, scheduler]
    digest = hashlib.sha256(json.dumps(shaped_by, ensure_ascii=False).encode()).hexdigest()[:12]
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-")
    return f"{words or 'class'}-{digest}"


def generate_class_images(
    model: StableDiffusion,
    prompt: str,
    *,
    numbers: Sequence[int],
    storage: Storage,
    seed: int = 0,
    batch_size: int = 4,
    steps: int = 25,
    guidance_scale: float = 7.5,
    resolution: int | None = None,
    scheduler: str = "ddim",
) -> None:
    """Draw images of `prompt` into `storage`, `resolution` pixels a side.

    Number i is `{i:06d}.png` and has a seed of its own.
    """
    # Neighbours: a CPU generator keeps 32 bits of a seed, of which hashes would come twice.
    first_seed = key("class image", seed) % 2**31
    for start in range(0, len(numbers), batch_size):
        part = numbers[start : start + batch_size]
        images = generate(
            model,
            [prompt] * len(part),
            seeds=[first_seed + i for i in part],
            steps=steps,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            width=resolution,
            height=resolution,
            batch_size=len(part),
            plain=True,  # as the prompt is trained
        )
        for i, image in zip(part, images, strict=True):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            storage.write_bytes(generated_name(i), buffer.getvalue())
