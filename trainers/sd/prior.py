"""Class pictures for prior preservation: drawn once by the untuned model, shared by every run with the same key."""

from __future__ import annotations

import hashlib
import io
import json
import re
from typing import TYPE_CHECKING

from dreamfleet.datasets.keyed import key
from dreamfleet.datasets.storage import Storage
from dreamfleet.trainers.sd.sample import generate

if TYPE_CHECKING:
    from dreamfleet.trainers.sd.model import StableDiffusion

_OURS = re.compile(r"\d{6}\.png")
_PICTURE = re.compile(r"(?i).*\.(png|jpe?g|webp|bmp)")


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
    storage: Storage,
    num: int,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    batch_size: int = 4,
    steps: int = 25,
    guidance_scale: float = 7.5,
    resolution: int | None = None,
    scheduler: str = "ddim",
) -> int:
    """Draw the missing ones of `num` pictures of `prompt` into `storage`; returns how many this rank drew.

    Picture i is `{i:06d}.png`, comes from a seed of its own, and is drawn by rank i mod world: any number of
    workers makes the same set, and a set cut short is continued. Pictures of other names (the user's own) count
    towards `num`. `resolution` is pixels a side.
    """
    names = set(storage.list())
    own = sum(1 for name in names if _PICTURE.fullmatch(name) and not _OURS.fullmatch(name))
    missing = [i for i in range(rank, num - own, world) if f"{i:06d}.png" not in names]
    # Neighbours: a CPU generator keeps 32 bits of a seed, of which hashes would come twice.
    first_seed = key("class image", seed) % 2**31
    for start in range(0, len(missing), max(1, batch_size)):
        part = missing[start : start + max(1, batch_size)]
        pictures = generate(
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
        for i, picture in zip(part, pictures, strict=True):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            storage.write_bytes(f"{i:06d}.png", buffer.getvalue())
    return len(missing)
