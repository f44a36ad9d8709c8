"""Reads the images in a run's preview grids, and embeds images in HTML pages."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.storage.storage import Storage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """One image of a preview grid, with its prompt, seed, position and scores."""

    prompt: str
    seed: int
    row: int
    column: int
    scores: dict[str, float]
    image: Image.Image


@dataclass(frozen=True)
class PreviewGrid:
    """The preview images of one step."""

    step: int
    cells: list[Cell]

    def of(self, prompt: str) -> list[Cell]:
        """Return the cells of a prompt from left to right."""
        return sorted((cell for cell in self.cells if cell.prompt == prompt), key=lambda c: (c.row, c.column))


def preview_steps(run: Storage) -> list[int]:
    """Return the steps of the preview grids in ``samples/``, ascending."""
    return sorted(int(m[1]) for name in run.list("samples") if (m := re.fullmatch(r"step-(\d+)\.png", name)))


def read_preview_grids(run: Storage, most: int) -> list[PreviewGrid]:
    """Read at most ``most`` preview grids in ``samples/``, evenly spread and including the first and the last."""
    steps = preview_steps(run)
    if len(steps) > most:
        steps = [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
    return [grid for step in steps if (grid := read_preview_grid(run, step)) is not None]


def read_preview_grid(run: Storage, step: int) -> PreviewGrid | None:
    """Read the preview grid of one step; None with a warning if it cannot be read."""
    stem = f"samples/step-{step:06d}"
    try:
        cells = _cells(run, stem)
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the report skips %s.png: %s", stem, error)
        return None
    return PreviewGrid(step, cells) if cells else None


def read_real_images(run: Storage, size: int | None) -> list[Image.Image]:
    """Read the training images in ``samples/real.png``, squares of ``size`` pixels."""
    if not run.exists("samples/real.png"):
        return []
    try:
        grid = _image(run, "samples/real.png")
    except (UserError, OSError, ValueError) as error:
        log.warning("the report skips samples/real.png: %s", error)
        return []
    if not size or size > min(grid.size):
        return [grid]
    columns, rows = grid.width // size, grid.height // size
    boxes = [
        _box(grid.size, (size, size), (rows, columns), (r, c)) for r in range(rows) for c in range(columns)
    ]
    images = [grid.crop(box) for box in boxes]
    return [
        image for image in images if image.getcolors(1) is None
    ]  # without the empty cells of the last row, which have one colour


def mosaic(images: Sequence[Image.Image], columns: int, *, cell: int, gap: int) -> Image.Image:
    """Return the images in a grid of square cells with transparent gaps; ``cell`` and ``gap`` are pixels."""
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGBA", (columns * (cell + gap) - gap, rows * (cell + gap) - gap))
    for n, image in enumerate(images):
        place = (n % columns * (cell + gap), n // columns * (cell + gap))
        grid.paste(image.convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS), place)
    return grid


def data_uri(image: Image.Image, *, longest: int) -> str:
    """Return an image as a WebP data URI, resized if a side is longer than ``longest`` pixels."""
    shrink = longest / max(image.size)
    if shrink < 1:
        size = (max(1, round(image.width * shrink)), max(1, round(image.height * shrink)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small = max(image.size) <= 160  # lossless, since compression artifacts would be visible
    image.save(buffer, "WEBP", lossless=small, quality=80 if small else 86)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _cells(run: Storage, stem: str) -> list[Cell]:
    grid = _image(run, f"{stem}.png")
    lines: list[dict[str, Any]] = [
        json.loads(x) for x in run.read_text(f"{stem}.jsonl").splitlines() if x.strip()
    ]
    shape = (max(x["row"] for x in lines) + 1, max(x["column"] for x in lines) + 1)
    cell = (max(x["width"] for x in lines), max(x["height"] for x in lines))
    cells = []
    for line in lines:
        left, top, *_ = _box(grid.size, cell, shape, (line["row"], line["column"]))
        left += (cell[0] - line["width"]) // 2  # smaller images are centred
        box = (left, top, left + line["width"], top + line["height"])
        scores = {k: float(v) for k, v in (line.get("scores") or {}).items() if isinstance(v, int | float)}
        place = (int(line["row"]), int(line["column"]))
        cells.append(Cell(str(line["prompt"]), int(line["seed"]), *place, scores, grid.crop(box)))
    return cells


def _box(
    grid: tuple[int, int], cell: tuple[int, int], shape: tuple[int, int], place: tuple[int, int]
) -> tuple[int, int, int, int]:
    # Cells are evenly spaced; the gap between them is equal on both axes.
    gaps = [
        (grid[axis] - shape[1 - axis] * cell[axis]) / (shape[1 - axis] - 1) if shape[1 - axis] > 1 else 0.0
        for axis in (0, 1)
    ]
    left, top = (round(place[1 - axis] * (cell[axis] + gaps[axis])) for axis in (0, 1))
    return left, top, left + cell[0], top + cell[1]


def _image(run: Storage, rel: str) -> Image.Image:
    with Image.open(io.BytesIO(run.read_bytes(rel))) as image:
        return image.convert("RGB")
