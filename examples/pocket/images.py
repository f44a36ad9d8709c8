"""Composes the pocket model's training images: an emoji on a background, with a caption that names both.

Run as a stage of `build.py` it writes two banks to the cache, `narrow` (the U-Net's subjects) and `wide` (further
emoji for the VAE and CLIP), each a memory-mapped uint8 array of 64 px images with a JSON table beside it.
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
    """A folder of composed images: `pictures.npy`, and for each its subject, background and caption."""

    images: np.ndarray
    subjects: np.ndarray
    backgrounds: np.ndarray
    captions: list[str]
    names: list[str]


def write_caption(name: str, key: str | None, template: str) -> str:
    """Fill a template with a subject's and a background's words, with the right article."""
    background = say_background(key) if key else ""
    text = template.replace("{b}", background)
    if name in _PLURALS:
        text = text.replace("a {s}", "{s}")
    elif name[0] in "aeiou" and not name.startswith("uni"):
        text = text.replace("a {s}", "an {s}")
    return " ".join(text.replace("{s}", name).split())


def draw_caption(name: str, key: str, rng: np.random.Generator) -> str:
    """A caption by a template drawn with its weight."""
    weights = np.array([weight for _, weight in TEMPLATES])
    template = TEMPLATES[rng.choice(len(TEMPLATES), p=weights / weights.sum())][0]
    return write_caption(name, key, template)


def open_emoji(path: Path) -> Image.Image:
    """An emoji as RGBA, cropped to what can be seen and padded to a square."""
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
    """Place an emoji on a background, with a varied scale, place, turn and shadow."""
    canvas = draw_background(key, rng, size)
    side = round(size * rng.uniform(0.68, 0.94))
    if flip and rng.random() < 0.5:
        emoji = emoji.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.6:
        emoji = emoji.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC)
    emoji = emoji.resize((side, side), Image.Resampling.LANCZOS)
    slack = size - side
    # Mostly near the middle: a small model learns shapes faster in a fixed position.
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
    """Place an emoji upright in the middle: the last part of the U-Net's training, in which it learns shapes."""
    canvas = draw_background(key, rng, size)
    side = round(size * rng.uniform(0.8, 0.88))
    emoji = emoji.resize((side, side), Image.Resampling.LANCZOS)
    x, y = ((size - side) // 2 + int(rng.integers(-1, 2)) for _ in range(2))
    canvas.paste(emoji, (x, y), emoji)
    return canvas


def _compose_subject(job: tuple[int, Subject, int, int]) -> tuple[np.ndarray, list[int], list[str]]:
    """All views of one subject; the seed depends on the subject alone, so any order gives the same images."""
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
    """Compose one bank and write it whole; the table is written last and marks it complete."""
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
    """The banks: training views, wide views, views of held-out subjects, and unseen views of trained ones."""
    subjects = list_subjects()
    train = [s for s in subjects if s.part == "train"]
    yield "narrow", train, 1
    yield "steady", [s for s in train if s.name not in SET_ASIDE], STEADY_SEED
    yield "wide", [s for s in subjects if s.part == "wide"], 2
    yield "held_out", [s for s in subjects if s.part == "held_out"], 3
    yield "fresh", train, 4


def write_images() -> None:
    """The stage `pictures`."""
    for name, subjects, seed in iterate_parts():
        write_bank(name, subjects, seed)


def draw_sheet(images: np.ndarray, columns: int, zoom: int = 1) -> Image.Image:
    """Images in rows, for a person to inspect."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * SIZE * zoom, rows * SIZE * zoom), (255, 255, 255))
    for index, image in enumerate(images):
        tile = Image.fromarray(np.asarray(image)).resize((SIZE * zoom, SIZE * zoom), Image.Resampling.NEAREST)
        sheet.paste(tile, ((index % columns) * SIZE * zoom, (index // columns) * SIZE * zoom))
    return sheet
