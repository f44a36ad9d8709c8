"""Renders a fleet as HTML for notebooks: counts, failures, and the first subjects with their images and scores."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence

from PIL import Image

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.metrics import figure_title
from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.report.html import environment
from dreamfleet.tune.fleet.page import INDEX, TEMPLATES
from dreamfleet.tune.fleet.parquet import TABLE
from dreamfleet.tune.fleet.rows import SubjectRow

MOST_ROWS, MOST_FAILED = 12, 4
SIDE = 72  # of one image in pixels; embedded twice as large, for dense screens


def notebook_html(rows: Sequence[SubjectRow], folder: str, *, title: str) -> str:
    """Return an HTML fragment with embedded images: up to ``MOST_FAILED`` failed subjects, then the first others.

    ``folder`` is the fleet's. Images that cannot be read are left out.
    """
    counts: Counter[str] = Counter()
    failed: list[SubjectRow] = []
    others: list[SubjectRow] = []
    seconds = 0.0
    for row in rows:
        counts[row.status] += 1
        seconds += row.seconds
        if row.status == "failed" and len(failed) < MOST_FAILED:
            failed.append(row)
        elif row.status != "failed" and len(others) < MOST_ROWS:
            others.append(row)
    shown = [*failed, *others][:MOST_ROWS]
    scores = list(dict.fromkeys(name for row in shown for name in row.scores))
    storage = Storage(folder)
    return environment(TEMPLATES).get_template("notebook_fleet.html").render(
        title=title,
        facts=[
            f"{formatting.number(len(rows))} subjects",
            *(f"{formatting.number(count)} {status}" for status, count in counts.most_common()),
            f"{formatting.seconds(seconds)} of compute time",
        ],
        columns=["subject", "base, tuned, real", *map(figure_title, scores), "steps", "time", "status"],
        rows=[(row, _thumbnail(storage, row), _values(row, scores)) for row in shown],
        more=len(rows) - len(shown),
        longest_side=2 * 3 * SIDE,
        side=SIDE,
        files=[("page", storage.path(INDEX)), ("table", storage.path(TABLE))],
    )  # fmt: skip


def _values(row: SubjectRow, scores: Sequence[str]) -> list[str]:
    values = [row.scores.get(name, math.nan) for name in scores]
    found = [formatting.number(value, 3) if math.isfinite(value) else "" for value in values]
    cost = [formatting.number(row.steps), formatting.seconds(row.seconds)]
    return [*found, *(cost if row.steps or row.seconds else ["", ""])]


def _thumbnail(fleet: Storage, row: SubjectRow) -> Image.Image | None:
    if row.images is None or row.images.thumbnail is None:
        return None
    try:
        with Image.open(io.BytesIO(fleet.read_bytes(row.images.thumbnail))) as image:
            return image.convert("RGB")
    except (UserError, OSError):  # the folder was moved or cannot be reached; the numbers remain
        return None
