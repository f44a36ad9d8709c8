"""The picture sheet of a search: what trials drew, one searched key from left to right, another from top to bottom."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from dreamfleet.trainers.config.search import Domain, SearchConfig, Value
from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.report.preview_grid import data_uri, mosaic, read_sheets
from dreamfleet.tune.trial_store import Ledger, Trial, tell_value

MOST_COLUMNS, MOST_ROWS = 6, 5
LONGEST_SIDE = 320  # pixels of one cell's picture on the page
IMAGES = 4  # of one trial


@dataclass(frozen=True)
class Axis:
    """A searched key cut into places: each has a label and says which values belong to it."""

    path: str
    labels: Sequence[str]
    place: Callable[[Value], int]

    @property
    def name(self) -> str:
        """The key's last part."""
        return self.path.rpartition(".")[2]


def axes(search: SearchConfig) -> tuple[str, str | None]:
    """Choose the keys that run across and down: the first range and the first choice, else the first two."""
    ranges = [path for path, domain in search.space.items() if domain.values is None]
    across = next(iter(ranges or search.space))
    others = [path for path in search.space if path != across]
    choices = [path for path in others if path not in ranges]
    return across, next(iter(choices or others), None)


def make_axis(path: str, domain: Domain, tried: Sequence[Value], most: int) -> Axis:
    """Cut a key into the values that were tried, or into equal parts of its range where those are many."""
    values = [v for v in domain.values if v in tried] if domain.values is not None else sorted(set(tried))  # type: ignore[type-var]
    if len(values) <= most or domain.values is not None:
        return Axis(path, [tell_value(value) for value in values], values.index)
    lower, upper = domain.range()
    scale: Callable[[float], float] = math.log if domain.log else float
    unscale: Callable[[float], float] = math.exp if domain.log else float
    width = (scale(upper) - scale(lower)) / most
    edges = [unscale(scale(lower) + k * width) for k in range(most + 1)]
    labels = [f"{formatting.number(a, 2)} – {formatting.number(b, 2)}" for a, b in itertools.pairwise(edges)]

    def place(value: Value) -> int:
        assert isinstance(value, int | float)
        return min(most - 1, max(0, int((scale(value) - scale(lower)) / width)))

    return Axis(path, labels, place)


def image_sheet(ledger: Ledger) -> str:
    """Return the section that shows the last previews of the best trial in each place."""
    search = ledger.search
    across, down = axes(search)
    shown = [trial for trial in ledger.ranking() if trial.figure(search.metric) is not None]
    columns = make_axis(across, search.space[across], [t.point[across] for t in shown], MOST_COLUMNS)
    rows = make_axis(down, search.space[down], [t.point[down] for t in shown], MOST_ROWS) if down else None
    places: dict[tuple[int, int], list[Trial]] = {}
    for trial in shown:
        row = rows.place(trial.point[rows.path]) if rows else 0
        places.setdefault((row, columns.place(trial.point[across])), []).append(trial)
    head = "".join(f"<th>{escape(label)}</th>" for label in columns.labels)
    body = ""
    drawn = 0
    for row, label in enumerate(rows.labels if rows else [""]):
        cells = ""
        for column in range(len(columns.labels)):
            cell, has_image = _cell(ledger, places.get((row, column), []))
            cells, drawn = cells + cell, drawn + has_image
        body += f"<tr><th>{escape(label)}</th>{cells}</tr>"
    if not drawn:
        return ""
    corner = f"{escape(columns.name)}&nbsp;→" + (f"<br>{escape(rows.name)}&nbsp;↓" if rows else "")
    note = "Where several trials fall into one place, the best of them is shown. The best of all is outlined."
    return (
        f"<section><h2>What they drew</h2><p class='note'>{note}</p><div class='wide' tabindex='0'>"
        f"<table class='sheet'><thead><tr><th>{corner}</th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _cell(ledger: Ledger, trials: Sequence[Trial]) -> tuple[str, bool]:
    if not trials:
        return "<td class='empty'></td>", False
    trial = trials[0]
    value = trial.figure(ledger.search.metric)
    assert value is not None
    words = trial.name + (f", best of {len(trials)}" if len(trials) > 1 else "")
    image = _previews(ledger, trial)
    image = f'<img src="{image}" alt="previews of {escape(trial.name)}" loading="lazy">' if image else ""
    mark = ' class="best"' if trial is ledger.best else ""
    inside = f"{image}<b>{escape(formatting.number(value, 4))}</b> <small>{escape(words)}</small>"
    return f'<td{mark}><a href="{escape(trial.folder)}/report.html">{inside}</a></td>', bool(image)


def _previews(ledger: Ledger, trial: Trial) -> str | None:
    sheets = read_sheets(ledger.folder.child(trial.folder), 2)
    if not sheets:
        return None
    cells = sheets[-1].cells
    # One of each prompt tells more than four of the first.
    first = sorted(cells, key=lambda cell: (cell.column, cell.row))[:IMAGES]
    columns = math.ceil(math.sqrt(len(first)))
    side = min(first[0].image.width, LONGEST_SIDE // columns)
    grid = mosaic([cell.image for cell in first], columns, cell=side, gap=max(1, side // 50))
    return data_uri(grid, longest=LONGEST_SIDE)
