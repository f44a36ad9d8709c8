"""Rows of fleets and their run folders for tests."""

from __future__ import annotations

import io
import json

from PIL import Image

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.tune.fleet.rows import SubjectImages, SubjectRow

HOSTILE = '</script><img src=x onerror=stop(1)> "quoted" & \u2028 #1 100%'
SIZE = 32
BASE, TUNED, REAL = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def make_row(number: int, name: str | None = None, **fields: object) -> SubjectRow:
    name = name or f"cat {number}"
    folder = f"subjects/{name}"
    done = {
        "status": "completed",
        "steps": 100 + number,
        "seconds": 60.0 + number,
        "scores": {"clip_i": number / 100, "holdout_loss": 1 - number / 100},
        "artifacts": [f"{folder}/exports/{name}.pt"],
        "run_folder": folder,
        "report": f"{folder}/report.html",
        "images": SubjectImages(
            f"a {name}",
            7,
            f"{folder}/samples/step-000000.png",
            f"{folder}/samples/step-000100.png",
            f"{folder}/samples/real.png",
            f"thumbnails/{name}.webp",
        ),
    }
    return SubjectRow(name, number, **{**done, **fields})  # type: ignore[arg-type]


def make_failed(number: int, name: str | None = None, reason: str = "no images") -> SubjectRow:
    return SubjectRow(name or f"cat {number}", number, "failed", reason)


def write_samples(
    run: Storage, steps: dict[int, tuple[int, int, int]], real: tuple[int, int, int] | None
) -> None:
    """Write preview grids of two prompts and two seeds, of which the very first cell has the colour of the step."""
    for step, colour in steps.items():
        grid = Image.new("RGB", (2 * SIZE, 2 * SIZE), "white")
        grid.paste(colour, (0, 0, SIZE, SIZE))
        cells = [
            {"prompt": f"prompt {row}", "seed": 7 + column, "row": row, "column": column}
            for row in (1, 0)
            for column in (1, 0)
        ]
        text = "\n".join(json.dumps({**cell, "width": SIZE, "height": SIZE}) for cell in cells)
        run.write_bytes(f"samples/step-{step:06d}.png", _png(grid))
        run.write_text(f"samples/step-{step:06d}.jsonl", text)
    if real is not None:
        grid = Image.new("RGB", (2 * SIZE, SIZE), real)
        grid.putpixel((0, 0), (0, 0, 0))  # squares of one colour are empty
        run.write_bytes("samples/real.png", _png(grid))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
