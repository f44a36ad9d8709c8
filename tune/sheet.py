"""The image sheet of a search: a table of trials' previews, with one searched key as columns and another as rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.search import Domain, SearchConfig, Value
from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.report.preview_grid import Cell as PreviewImage
from dreamfleet.trainers.report.preview_grid import mosaic, preview_steps, read_preview_grid
from dreamfleet.tune.trial_store import Trial, TrialStore, format_value

TEMPLATES = Path(__file__).with_name("templates")
MOST_COLUMNS, MOST_ROWS = 6, 5
LONGEST_SIDE = 320  # longest side in pixels of a cell's image on the page
IMAGES = 4  # maximum number of images of one trial


@dataclass(frozen=True)
class Axis:
    """A searched key divided into bins with ``labels``; ``bin`` maps a value to the index of its bin."""

    path: str
    labels: Sequence[str]
    bin: Callable[[Value], int]

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Cell:
    """The best trial in one cell, the number of trials in the cell, and the previews of the best trial's best round."""

    trial: Trial
    count: int
    image: Image.Image | None


@dataclass(frozen=True)
class ImageSheet:
    """A table of cells; ``rows`` contains a label and the cells of each row, None for an empty cell."""

    across: Axis
    down: Axis | None
    rows: Sequence[tuple[str, Sequence[Cell | None]]]


def axes(search: SearchConfig) -> tuple[str, str | None]:
    """Return the keys for columns and rows: the first range and the first choice, or else the first two keys."""
    ranges = [path for path, domain in search.space.items() if domain.values is None]
    across = next(iter(ranges or search.space))
    others = [path for path in search.space if path != across]
    choices = [path for path in others if path not in ranges]
    return across, next(iter(choices or others), None)


def make_axis(path: str, domain: Domain, tried: Sequence[Value], most: int) -> Axis:
    """Return an axis with a bin for each tried value, or with ``most`` equal bins of a range if there are more."""
    values = [v for v in domain.values if v in tried] if domain.values is not None else sorted(set(tried))  # type: ignore[type-var]
    if len(values) <= most or domain.values is not None:
        return Axis(path, [format_value(value) for value in values], values.index)
    lower, upper = domain.range()
    scale: Callable[[float], float] = math.log if domain.log else float
    unscale: Callable[[float], float] = math.exp if domain.log else float
    width = (scale(upper) - scale(lower)) / most
    edges = [unscale(scale(lower) + k * width) for k in range(most + 1)]
    labels = [f"{formatting.number(a, 2)} – {formatting.number(b, 2)}" for a, b in itertools.pairwise(edges)]

    def bin_of(value: Value) -> int:
        assert isinstance(value, int | float)
        return min(most - 1, max(0, int((scale(value) - scale(lower)) / width)))

    return Axis(path, labels, bin_of)


def image_sheet(store: TrialStore) -> ImageSheet | None:
    """Return the previews of the best trial of each cell; None if no trial has previews."""
    search = store.search
    key_across, key_down = axes(search)
    shown = [trial for trial in store.ranking() if trial.figure(search.objective) is not None]
    across = make_axis(
        key_across, search.space[key_across], [t.point[key_across] for t in shown], MOST_COLUMNS
    )
    down = None
    if key_down:
        down = make_axis(key_down, search.space[key_down], [t.point[key_down] for t in shown], MOST_ROWS)
    cells: dict[tuple[int, int], list[Trial]] = {}
    for trial in shown:
        row = down.bin(trial.point[down.path]) if down else 0
        cells.setdefault((row, across.bin(trial.point[across.path])), []).append(trial)
    rows = [
        (label, [_cell(store, cells.get((row, column), [])) for column in range(len(across.labels))])
        for row, label in enumerate(down.labels if down else [""])
    ]
    if not any(cell and cell.image for _, row_cells in rows for cell in row_cells):
        return None
    return ImageSheet(across, down, rows)


def _cell(store: TrialStore, trials: Sequence[Trial]) -> Cell | None:
    return Cell(trials[0], len(trials), _mosaic(store, trials[0])) if trials else None


def trial_previews(search: Storage, trial: Trial) -> list[PreviewImage]:
    """Return the previews of a trial's best round, or of the round with previews nearest to it; [] without any."""
    run = search.child(trial.folder)
    steps = preview_steps(run)
    wanted = trial.best_step
    if not steps or wanted is None:
        return []
    grid = read_preview_grid(run, min(steps, key=lambda step: (abs(step - wanted), -step)))
    return grid.cells if grid else []


def _mosaic(store: TrialStore, trial: Trial) -> Image.Image | None:
    cells = trial_previews(store.folder, trial)
    if not cells:
        return None
    # One image of each prompt is more informative than four of the first prompt.
    first = sorted(cells, key=lambda cell: (cell.column, cell.row))[:IMAGES]
    columns = math.ceil(math.sqrt(len(first)))
    side = min(first[0].image.width, LONGEST_SIDE // columns)
    return mosaic([cell.image for cell in first], columns, cell=side, gap=max(1, side // 50))
