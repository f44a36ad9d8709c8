"""Renders results as HTML for notebooks: small images, a table, and the paths of the files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml
from PIL import Image

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.metrics import figure_title
from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.report.html import environment
from dreamfleet.trainers.report.preview_grid import Cell, mosaic, read_preview_grids, read_real_images

LONGEST_SIDE = 200  # longest side in pixels of an image
MOST_IMAGES = 4  # images in one mosaic
TITLES = {"loss": "training loss"}  # of figures without a metric
MEASURED: dict[
    str, tuple[str, Callable[[float], str]]
] = {  # figures of a summary that are shown with the scores
    "images_per_second": ("images / s", formatting.number),
    "data_wait_fraction": ("waiting for data", formatting.share),
    "peak_memory_bytes": ("peak memory", formatting.size),
}


def fragment(
    title: str,
    facts: Sequence[str],
    *,
    images: Sequence[tuple[str, Image.Image]] = (),
    columns: Sequence[str] = (),
    rows: Sequence[Sequence[str]] = (),
    bold: Sequence[str] | None = None,
    files: Sequence[tuple[str, str]] = (),
) -> str:
    """Return an HTML fragment: a heading with facts, images with captions, a table, and named paths.

    ``bold`` is the row, one of ``rows``, that is printed bold.
    """
    page = environment().get_template("notebook.html")
    return page.render(
        title=title, facts=facts, images=images, columns=columns, rows=rows, bold=bold, files=files,
        longest_side=LONGEST_SIDE,
    )  # fmt: skip


def run_html(run: Storage, summary: Mapping[str, Any]) -> str:
    """Return a run's result as an HTML fragment: base, tuned and real images, metrics, and artifacts.

    ``summary`` are the fields of ``summary.json``.
    """
    facts = [str(summary["exit_reason"]), f"{formatting.number(summary['steps'])} steps"]
    facts += [formatting.seconds(summary["wall_seconds"]), f"{summary['workers']} × {summary['device']}"]
    figures = summary["figures"] or {}
    rows = [
        (TITLES.get(name) or figure_title(name), formatting.number(value, 4))
        for name, value in figures.items()
        if name not in MEASURED and isinstance(value, int | float) and math.isfinite(value)
    ]
    rows += [(name, write(figures[key])) for key, (name, write) in MEASURED.items() if figures.get(key)]
    files = [("run", run.path()), *(("artifact", run.path("exports", name)) for name in summary["exports"])]
    return fragment(
        str(summary["run"]),
        facts,
        images=_images(run),
        columns=("metric", "value") if rows else (),
        rows=rows,
        files=[*files, ("report", run.path("report.html"))],
    )


def preview_mosaic(cells: Sequence[Cell]) -> Image.Image:
    """Return up to ``MOST_IMAGES`` previews as one image: the first of each prompt before the second of any."""
    chosen = sorted(cells, key=lambda cell: (cell.column, cell.row))[:MOST_IMAGES]
    return _square([cell.image for cell in chosen])


def _images(run: Storage) -> list[tuple[str, Image.Image]]:
    try:
        grids, real = read_preview_grids(run, 2), read_real_images(run, _resolution(run))
    except UserError:  # the folder is gone or cannot be reached; the numbers remain
        return []
    images = [(f"step {grid.step}" if grid.step else "base", preview_mosaic(grid.cells)) for grid in grids]
    return [*images, ("training images", _square(real[:MOST_IMAGES]))] if real else images


def _resolution(run: Storage) -> int | None:
    try:
        found = yaml.safe_load(run.read_text("recipe.yaml"))["data"]["resolution"]
    except (UserError, OSError, yaml.YAMLError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) else None


def _square(images: Sequence[Image.Image]) -> Image.Image:
    if len(images) == 1:
        return images[0]
    columns = math.ceil(math.sqrt(len(images)))
    side = min(images[0].width, LONGEST_SIDE // columns)
    return mosaic(images, columns, cell=side, gap=max(1, side // 50))
