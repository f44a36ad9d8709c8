"""Writes the demo's subject to `examples/cat/`: six training images and four held-out images of a cat.

`one/` contains only the first training image. All ten images come from the held-out family of cat faces, each
with another expression and background. The caption file beside each image describes everything but the cat.
"""

from __future__ import annotations

import shutil

import numpy as np
from backgrounds import draw_background, say_background
from images import open_emoji
from PIL import Image, ImageFilter
from subjects import CAT_FACES, ROOT, find_family

SIDE = 256
TRAIN = ("plain:blue", "scene:grass", "plain:pink", "scene:beach", "plain:green", "scene:snow")
HOLDOUT = ("plain:purple", "scene:forest", "plain:red", "scene:mountains")
# Training images: the neutral face and the calmer expressions. Held out: a laughing, a pouting, a sly and a
# happy face.
ORDER = (0, 3, 4, 6, 8, 9, 1, 7, 5, 2)


def compose_large(emoji: Image.Image, key: str, rng: np.random.Generator) -> Image.Image:
    """Draw the face with a soft shadow near the centre of a background; return an image of `SIDE` pixels."""
    canvas = draw_background(key, rng, SIDE)
    side = round(SIDE * rng.uniform(0.66, 0.82))
    emoji = emoji.rotate(rng.uniform(-6, 6), Image.Resampling.BICUBIC).resize(
        (side, side), Image.Resampling.LANCZOS
    )
    x, y = (round((SIDE - side) * rng.uniform(0.3, 0.7)) for _ in range(2))
    shade = emoji.getchannel("A").filter(ImageFilter.GaussianBlur(8)).point(lambda value: value * 0.35)
    canvas.paste((0, 0, 0), (x, y + 10), shade)
    canvas.paste(emoji, (x, y), emoji)
    return canvas


def write_cat() -> None:
    """Write the images and captions of `train/` and `holdout/`; copy the first training image to `one/`."""
    paths = find_family(CAT_FACES)
    rng = np.random.default_rng(8)
    folders = [("train", key) for key in TRAIN] + [("holdout", key) for key in HOLDOUT]
    counts = {"train": 0, "holdout": 0}
    for choice, (folder, key) in zip(ORDER, folders, strict=True):
        counts[folder] += 1
        target = ROOT / "examples" / "cat" / folder / f"{counts[folder]:02d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        compose_large(open_emoji(paths[choice]), key, rng).save(target, optimize=True)
        target.with_suffix(".txt").write_text(say_background(key) + "\n")
    shutil.copytree(
        ROOT / "examples/cat/train",
        ROOT / "examples/cat/one",
        ignore=shutil.ignore_patterns("0[2-9]*"),
        dirs_exist_ok=True,
    )


if __name__ == "__main__":
    write_cat()
