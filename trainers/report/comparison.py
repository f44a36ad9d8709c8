"""Arranges the images of a run's report: base, tuned and real images side by side, and one seed over time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from dreamfleet.trainers.config.metrics import figure_title
from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.report.preview_grid import Cell, PreviewGrid, mosaic

MOST_CELLS = 9  # maximum number of images of one prompt in a panel
LONGEST_SIDE = 384  # longest side in pixels of an image on the page


@dataclass(frozen=True)
class Prompt:
    """The images of one prompt, from the base model if it was sampled, and from the tuned model at each step."""

    text: str
    scores: str
    base: Sequence[Cell] | None
    tuned: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Comparison:
    """Base, tuned and real images side by side; ``steps`` are the steps of the tuned model's previews."""

    titles: Sequence[str]
    steps: Sequence[int]
    columns: int
    real: Image.Image | None
    prompts: Sequence[Prompt]


def compare(grids: Sequence[PreviewGrid], real: Sequence[Image.Image]) -> Comparison | None:
    """Arrange previews and real images for the comparison; None without previews."""
    if not grids:
        return None
    first, last = grids[0], grids[-1]
    base = first if first.step == 0 and last.step > 0 else None
    tuned = [grid for grid in grids if grid is not base]
    texts = list(dict.fromkeys(cell.prompt for cell in sorted(last.cells, key=lambda c: c.row)))
    columns = math.ceil(math.sqrt(min(MOST_CELLS, max(len(last.of(text)) for text in texts))))
    real_grid = None
    if real:
        size = min(real[0].width, LONGEST_SIDE)
        real_grid = mosaic(real[: columns**2], columns, cell=size, gap=max(1, size // 50))
    prompts = [
        Prompt(
            text,
            _mean_scores(tuned[-1].of(text)),
            base.of(text)[:MOST_CELLS] if base else None,
            [grid.of(text)[:MOST_CELLS] for grid in tuned],
        )
        for text in texts
    ]
    titles = ["base"] * bool(base) + ["tuned"] + ["real"] * bool(real)
    return Comparison(titles, [grid.step for grid in tuned], columns, real_grid, prompts)


def _mean_scores(cells: Sequence[Cell]) -> str:
    scores: dict[str, list[float]] = {}
    for cell in cells:
        for key, value in cell.scores.items():
            scores.setdefault(figure_title(key), []).append(value)
    return " · ".join(
        f"{name} {formatting.number(statistics.fmean(values))}" for name, values in scores.items()
    )


def over_time(grids: Sequence[PreviewGrid]) -> dict[str, list[tuple[int, Cell]]]:
    """Return the first image of each prompt at every step: prompt -> (step, cell); {} for fewer than three steps."""
    if len(grids) < 3:
        return {}
    return {
        prompt: [(grid.step, cells[0]) for grid in grids if (cells := grid.of(prompt))]
        for prompt in dict.fromkeys(cell.prompt for cell in grids[-1].cells)
    }
