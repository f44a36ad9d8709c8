"""Writes images of other objects, sampled from the pocket model, to `examples/judge/others/`, and the label files."""

from __future__ import annotations

import json
from pathlib import Path

from dreamfleet.trainers.config.image_request import requests_for
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.models.family import load_model
from dreamfleet.trainers.models.sampling.sample import generate

HERE = Path(__file__).parent
THINGS = ("teddy bear", "crown", "croissant", "dolphin", "koala", "jellyfish", "butterfly", "lemon", "snowman",
          "rabbit", "house", "tiger")  # fmt: skip
PLACES = ("on a blue background", "on the beach", "in the snow", "at night")
TRAIN = 16  # number of the other images in the training split; the rest is held out


def write_others() -> None:
    """Sample two images per entry of `THINGS`, and write the labels of the training and the test split."""
    prompts = [f"a {THINGS[n % len(THINGS)]} {PLACES[n % len(PLACES)]}" for n in range(2 * len(THINGS))]
    requests = requests_for(prompts, range(len(prompts)), guidance_scale=4.0)
    drawn = generate(load_model(ModelConfig()), requests, batch_size=8)
    for number, image in enumerate(drawn, 1):
        target = HERE / "others" / f"{number:02d}.png"
        target.parent.mkdir(exist_ok=True)
        image.save(target, optimize=True)
    others = [f"judge/others/{number:02d}.png" for number in range(1, len(drawn) + 1)]
    for name, cats, ink, drawings in (
        ("train", "cat/train", "ink/train", others[:TRAIN]),
        ("test", "cat/holdout", "ink/holdout", others[TRAIN:]),
    ):
        labels = dict.fromkeys(_images(cats), 1)
        labels |= dict.fromkeys([*_images(ink), *drawings], 0)
        (HERE / f"{name}.json").write_text(json.dumps(labels, indent=1) + "\n")


def _images(folder: str) -> list[str]:
    return [f"{folder}/{path.name}" for path in sorted((HERE.parent / folder).glob("*.png"))]


if __name__ == "__main__":
    write_others()
