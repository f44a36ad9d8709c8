"""Composes the pocket model's training images: an emoji on a background, with a caption that names both.

As a stage of `build.py` it writes banks of images to the cache, such as `narrow` (the U-Net's subjects) and
`wide` (further emoji for the VAE and CLIP); each is a memory-mapped uint8 array of 64 px images and a JSON
table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from backgrounds import KEYS, SIZE, WEIGHTS, draw_background, say_background
from PIL import Image, ImageFilter
from subjects import CACHE, SET_ASIDE, Subject, list_subjects

VIEWS = {"narrow": 320, "steady": 96, "wide": 24, "held_out": 40, "fresh": 4}
STEADY_SEED = 5
# A flip would mirror text.
NO_FLIP = ("bus", "ambulance", "red pepper")
TEMPLATES = (
    ("a {s} {b}", 5),
    ("a photo of a {s} {b}", 3),
    ("a picture of a {s} {b}", 2),
    ("the {s} {b}", 1),
    ("{s} {b}", 2),
    ("a {s}", 1),
    ("a photo of a {s}", 1),
    ("{s}", 0.5),
)
_PLURALS = ("pancakes", "grapes", "cherries", "blueberries", "french fries", "paw prints", "bacon", "popcorn",
            "spaghetti", "sushi", "cheese", "garlic", "broccoli", "candy", "custard")  # fmt: skip


@dataclass(frozen=True)
class Bank:
    """A set of composed images.

    `images`: uint8 (n, 64, 64, 3). `subjects` and `backgrounds`: for each image the index into `names` and
    `KEYS`.
    """

    images: np.ndarray
    subjects: np.ndarray
    backgrounds: np.ndarray
    captions: list[str]
    names: list[str]


def write_caption(name: str, key: str | None, template: str) -> str:
    """Fill a template with the names of a subject and a background, with the correct article."""
    background = say_background(key) if key else ""
    text = template.replace("{b}", background)
    if name in _PLURALS:
        text = text.replace("a {s}", "{s}")
    elif name[0] in "aeiou" and not name.startswith("uni"):
        text = text.replace("a {s}", "an {s}")
    return " ".join(text.replace("{s}", name).split())


def draw_caption(name: str, key: str, rng: np.random.Generator) -> str:
    """Return a caption from a template that is sampled by its weight."""
    weights = np.array([weight for _, weight in TEMPLATES])
    template = TEMPLATES[rng.choice(len(TEMPLATES), p=weights / weights.sum())][0]
    return write_caption(name, key, template)


def open_emoji(path: Path) -> Image.Image:
    """Open an emoji as RGBA, cropped to its visible pixels and padded to a square."""
    with Image.open(path) as raw:
        image = raw.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda value: 255 if value > 8 else 0).getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def compose(
    emoji: Image.Image, key: str, rng: np.random.Generator, size: int = SIZE, flip: bool = True
) -> Image.Image:
    """Draw an emoji on a background with random scale, position, rotation, flip and shadow."""
    canvas = draw_background(key, rng, size)
    side = round(size * rng.uniform(0.68, 0.94))
    if flip and rng.random() < 0.5:
        emoji = emoji.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.6:
        emoji = emoji.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC)
    emoji = emoji.resize((side, side), Image.Resampling.LANCZOS)
    slack = size - side
    # Most positions are near the centre: a small model learns shapes faster at a fixed position.
    x, y = (round(slack * np.clip(rng.normal(0.5, 0.22), 0, 1)) for _ in range(2))
    if rng.random() < 0.5:
        shade = (
            emoji.getchannel("A")
            .filter(ImageFilter.GaussianBlur(size / 32))
            .point(lambda value: value * 0.35)
        )
        canvas.paste((0, 0, 0), (x, y + size // 24), shade)
    canvas.paste(emoji, (x, y), emoji)
    return canvas


def compose_steady(emoji: Image.Image, key: str, rng: np.random.Generator, size: int = SIZE) -> Image.Image:
    """Draw an emoji upright in the centre, for the last part of the U-Net's training."""
    canvas = draw_background(key, rng, size)
    side = round(size * rng.uniform(0.8, 0.88))
    emoji = emoji.resize((side, side), Image.Resampling.LANCZOS)
    x, y = ((size - side) // 2 + int(rng.integers(-1, 2)) for _ in range(2))
    canvas.paste(emoji, (x, y), emoji)
    return canvas


def _compose_subject(job: tuple[int, Subject, int, int]) -> tuple[np.ndarray, list[int], list[str]]:
    """Compose all views of one subject; return images (views, 64, 64, 3), background indices and captions.

    The seed depends on the bank and the subject only, so the images do not depend on the order of the jobs.
    """
    index, subject, views, seed = job
    rng = np.random.default_rng([seed, index])
    emoji = open_emoji(subject.path).resize((128, 128), Image.Resampling.LANCZOS)
    images = np.empty((views, SIZE, SIZE, 3), np.uint8)
    keys, captions = [], []
    for view in range(views):
        if seed == STEADY_SEED:
            key = int(rng.choice([i for i, name in enumerate(KEYS) if name.startswith(("plain", "scene"))]))
            images[view] = compose_steady(emoji, KEYS[key], rng)
        else:
            key = int(rng.choice(len(KEYS), p=WEIGHTS))
            images[view] = compose(emoji, KEYS[key], rng, flip=subject.name not in NO_FLIP)
        keys.append(key)
        captions.append(draw_caption(subject.name, KEYS[key], rng))
    return images, keys, captions


def write_bank(name: str, subjects: list[Subject], seed: int) -> None:
    """Compose and write one bank; the table is written last, and a bank with a table is skipped."""
    folder = CACHE / "banks" / name
    if (folder / "table.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    views = VIEWS[name]
    shape = (len(subjects) * views, SIZE, SIZE, 3)
    images = np.lib.format.open_memmap(folder / "pictures.npy", "w+", np.uint8, shape)
    table: dict[str, list] = {
        "names": [s.name for s in subjects],
        "subjects": [],
        "backgrounds": [],
        "captions": [],
    }
    jobs = [(index, subject, views, seed) for index, subject in enumerate(subjects)]
    with Pool(2) as pool:
        for index, (part, keys, captions) in enumerate(pool.imap(_compose_subject, jobs)):
            images[index * views : (index + 1) * views] = part
            table["subjects"] += [index] * views
            table["backgrounds"] += keys
            table["captions"] += captions
    images.flush()
    (folder / "table.json").write_text(json.dumps(table), encoding="utf-8")


def open_bank(name: str) -> Bank:
    """Open a bank that `write_bank` wrote."""
    folder = CACHE / "banks" / name
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    images = np.load(folder / "pictures.npy", mmap_mode="r")
    subjects, backgrounds = (np.array(table[column]) for column in ("subjects", "backgrounds"))
    return Bank(images, subjects, backgrounds, table["captions"], table["names"])


def iterate_parts() -> Iterator[tuple[str, list[Subject], int]]:
    """Yield the name, subjects and seed of each bank.

    `narrow` and `steady`: training views. `wide`: further subjects. `held_out`: views of held-out subjects.
    `fresh`: unseen views of trained subjects.
    """
    subjects = list_subjects()
    train = [s for s in subjects if s.part == "train"]
    yield "narrow", train, 1
    yield "steady", [s for s in train if s.name not in SET_ASIDE], STEADY_SEED
    yield "wide", [s for s in subjects if s.part == "wide"], 2
    yield "held_out", [s for s in subjects if s.part == "held_out"], 3
    yield "fresh", train, 4


def write_images() -> None:
    """Run the first stage: write all banks."""
    for name, subjects, seed in iterate_parts():
        write_bank(name, subjects, seed)


def draw_sheet(images: np.ndarray, columns: int, zoom: int = 1) -> Image.Image:
    """Return a sheet of images in `columns` columns, each enlarged `zoom` times."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * SIZE * zoom, rows * SIZE * zoom), (255, 255, 255))
    for index, image in enumerate(images):
        tile = Image.fromarray(np.asarray(image)).resize((SIZE * zoom, SIZE * zoom), Image.Resampling.NEAREST)
        sheet.paste(tile, ((index % columns) * SIZE * zoom, (index // columns) * SIZE * zoom))
    return sheet
