"""Reads a run's preview grids back as single pictures, and packs pictures into an HTML page."""

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
    """One picture of a grid: what it was drawn from, how it scored, and the picture."""

    prompt: str
    seed: int
    row: int
    column: int
    scores: dict[str, float]
    image: Image.Image


@dataclass(frozen=True)
class Sheet:
    """The preview grid of one step."""

    step: int
    cells: list[Cell]

    def of(self, prompt: str) -> list[Cell]:
        """List the cells of a prompt from left to right."""
        return sorted((cell for cell in self.cells if cell.prompt == prompt), key=lambda c: (c.row, c.column))


def read_sheets(run: Storage, most: int) -> list[Sheet]:
    """Read the preview grids in `samples/`, at most so many, evenly spread, first and last among them."""
    names = [m for name in run.list("samples") if (m := re.fullmatch(r"(step-(\d+))\.png", name))]
    names.sort(key=lambda match: int(match[2]))
    if len(names) > most:
        names = [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]
    sheets = []
    for match in names:
        try:
            cells = _cells(run, f"samples/{match[1]}")
        except (UserError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the report leaves out samples/%s: %s", match[0], error)
            continue
        if cells:
            sheets.append(Sheet(int(match[2]), cells))
    return sheets


def read_real(run: Storage, size: int | None) -> list[Image.Image]:
    """Read the training pictures that `samples/real.png` shows, as squares of `size` pixels."""
    if not run.exists("samples/real.png"):
        return []
    try:
        grid = _image(run, "samples/real.png")
    except (UserError, OSError, ValueError) as error:
        log.warning("the report leaves out samples/real.png: %s", error)
        return []
    if not size or size > min(grid.size):
        return [grid]
    columns, rows = grid.width // size, grid.height // size
    boxes = [
        _box(grid.size, (size, size), (rows, columns), (r, c)) for r in range(rows) for c in range(columns)
    ]
    cuts = [grid.crop(box) for box in boxes]
    return [
        cut for cut in cuts if cut.getcolors(1) is None
    ]  # places that the last row leaves empty have one colour


def mosaic(images: Sequence[Image.Image], columns: int, *, cell: int, gap: int) -> Image.Image:
    """Join the pictures in a grid of `columns` with transparent gaps; the last row may be short."""
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGBA", (columns * (cell + gap) - gap, rows * (cell + gap) - gap))
    for n, image in enumerate(images):
        place = (n % columns * (cell + gap), n // columns * (cell + gap))
        sheet.paste(image.convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS), place)
    return sheet


def data_uri(image: Image.Image, *, longest: int) -> str:
    """Pack a picture as a WebP data URI, made smaller when a side is over `longest` pixels."""
    shrink = longest / max(image.size)
    if shrink < 1:
        size = (max(1, round(image.width * shrink)), max(1, round(image.height * shrink)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small = max(image.size) <= 160  # lossy blocks would show
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
        left += (cell[0] - line["width"]) // 2  # as the grid places smaller pictures
        box = (left, top, left + line["width"], top + line["height"])
        scores = {k: float(v) for k, v in (line.get("scores") or {}).items() if isinstance(v, int | float)}
        place = (int(line["row"]), int(line["column"]))
        cells.append(Cell(str(line["prompt"]), int(line["seed"]), *place, scores, grid.crop(box)))
    return cells


def _box(
    grid: tuple[int, int], cell: tuple[int, int], shape: tuple[int, int], place: tuple[int, int]
) -> tuple[int, int, int, int]:
    # Cells are evenly spread; what they leave over is the gap between them, the same on both axes where both have one.
    gaps = [
        (grid[axis] - shape[1 - axis] * cell[axis]) / (shape[1 - axis] - 1) if shape[1 - axis] > 1 else 0.0
        for axis in (0, 1)
    ]
    left, top = (round(place[1 - axis] * (cell[axis] + gaps[axis])) for axis in (0, 1))
    return left, top, left + cell[0], top + cell[1]


def _image(run: Storage, rel: str) -> Image.Image:
    with Image.open(io.BytesIO(run.read_bytes(rel))) as image:
        return image.convert("RGB")
