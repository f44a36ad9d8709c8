"""Writes a fleet's index.html and fleet.parquet, also while the fleet runs.

The page works without a server, from a disk or a copied bucket: browsers do not let a local page fetch other files, but
they load its scripts, so the rows are in scripts of ``PART`` subjects each.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from urllib.parse import quote

from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.metrics import figure_title, is_higher_better
from dreamfleet.trainers.report.html import environment
from dreamfleet.tune.fleet.parquet import write_fleet_table
from dreamfleet.tune.fleet.rows import SubjectImages, SubjectRow

INDEX = "index.html"
PART = 500  # subjects in one script
TEMPLATES = Path(__file__).with_name("templates")


class FleetPage:
    """The page and the table of one fleet; ``folder`` is the fleet's, ``method`` the title of its method."""

    def __init__(
        self, folder: Storage, *, title: str, method: str, clock: Callable[[], float] = time.monotonic
    ):
        self.folder, self.title, self.method, self._clock = folder, title, method, clock
        self._parts: int | None = None  # None before the first update
        self._table_written, self._table_seconds = 0.0, 0.0

    def update(
        self, rows: Sequence[SubjectRow], changed: Collection[int] | None = None, *, final: bool = False
    ) -> None:
        """Write the parts of the page that contain ``changed`` rows (indices), and the table.

        The first update writes all parts, as does None. Only slices of ``rows`` are read, and none is kept. Writing
        the table takes at most a twentieth of the time, except in the ``final`` update.
        """
        parts = _count_parts(rows)
        numbers = set(range(parts))
        if self._parts is not None and changed is not None:
            numbers = {index // PART for index in changed} | set(range(self._parts, parts))
        for number in sorted(numbers):
            self.folder.write_text(_part_name(number), render_part(number, rows, written=time.time()))
        if parts != self._parts:
            self.folder.write_text(INDEX, render_index(parts, title=self.title, method=self.method))
        start = self._clock()
        if self._parts is None or final or start - self._table_written > 20 * self._table_seconds:
            write_fleet_table(self.folder, rows)
            self._table_written, self._table_seconds = self._clock(), self._clock() - start
        self._parts = parts


def render_index(parts: int, *, title: str, method: str) -> str:
    """Return ``index.html``, which loads that many parts."""
    return environment(TEMPLATES).get_template("fleet.html").render(
        title=title, method=method, parts=[_part_name(n) for n in range(parts)]
    )  # fmt: skip


def render_part(number: int, rows: Sequence[SubjectRow], *, written: float) -> str:
    """Return the script that hands one part of all rows to the page."""
    found = rows[number * PART : (number + 1) * PART]
    scores = list(dict.fromkeys(name for row in found for name in row.scores))
    part = {
        "written": round(written),
        "scores": [[name, figure_title(name), is_higher_better(name)] for name in scores],
        "rows": [_fields(row, scores) for row in found],
    }
    text = json_text(part).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return f"fleet.add({number}, {text});\n"


def _fields(row: SubjectRow, scores: Sequence[str]) -> list[object]:
    # The order is that of the destructuring assignment in fleet.js.
    images = row.images or SubjectImages()
    return [
        row.name,
        row.status,
        row.reason,
        row.steps,
        round(row.seconds, 2),
        [_rounded(row.scores.get(name)) for name in scores],
        _url(row.report),
        _url(images.thumbnail),
        images.roles,
        images.prompt,
        images.seed,
        row.prompt,
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _url(path: str | None) -> str | None:
    """Return a relative path as a URL. A name may contain any character, also ``#``, ``%`` and ``:``."""
    return None if path is None else quote(os.fsencode(path))


def _part_name(number: int) -> str:
    return f"page/subjects-{number:03d}.js"


def _count_parts(rows: Sequence[SubjectRow]) -> int:
    return -(-len(rows) // PART)
