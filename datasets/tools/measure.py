"""Measures the images of a set into a table of columns, for filters and for sorting: blur, and models' scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.images.sharpness import laplacian_variance
from dreamfleet.datasets.index.filters import SEARCHABLE
from dreamfleet.datasets.index.set_store import column_file
from dreamfleet.datasets.index.sources import ScanOptions
from dreamfleet.datasets.index.table_builder import TABLE_SCHEMA
from dreamfleet.datasets.processing.mapping import mapper_of
from dreamfleet.datasets.processing.runner import Workers
from dreamfleet.datasets.tools.annotate import Describe, Makers, annotate, refuse_unreadable
from dreamfleet.datasets.tools.image_set import list_set
from dreamfleet.datasets.tools.image_tables import ImageTable

BLUR = "blur"
OWN_COLUMNS = "measured.parquet"  # the file of a set's own columns
_TAKEN = frozenset(("url", *TABLE_SCHEMA.names, *SEARCHABLE))


class Measured(NamedTuple):
    """The result of measuring a set: quantiles of each column, and the images that could not be read."""

    table: str
    images: int
    new: int
    columns: dict[str, dict[str, float]]  # column -> "0%", "5%", "50%", "95%", "100%" -> value
    failed: dict[str, str]


def measure_blur() -> Describe:
    """Return the measure `blur`, which needs no model."""
    return _blur_of


def measure_set(
    url: str,
    makers: Makers,
    out: str | None = None,
    *,
    workers: Workers = Workers(),  # noqa: B008 - frozen
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """Measure the images of a set into the Parquet table ``out``, with a column for each of ``makers``.

    Without ``out`` they become columns of the set, which `data.where` sees. An existing table gets the new columns;
    images that have all of them are not measured again. Rerunning the call continues after an interruption. Raises
    DataError if no image can be read.
    """
    found = list_set(url, ScanOptions(mapper=mapper_of(workers)))
    table = ImageTable(out or column_file(found.url, OWN_COLUMNS), makers)
    pending = [image for image in found.images if not table.has(image.uri)]
    failed: dict[str, str] = {}
    try:
        for row in annotate(
            pending, makers, workers, batch_size=batch_size, failed=failed, progress=progress
        ):
            table.add(row["uri"], row["sha256"], row["values"])
    finally:
        table.flush()
    refuse_unreadable(failed, found.images)
    saved = table.save(image.uri for image in found.images)
    columns = {name: quantiles(saved, name) for name in makers}
    return Measured(table.address, saved.num_rows, len(pending) - len(failed), columns, failed)


def quantiles(table: pa.Table, column: str) -> dict[str, float]:
    """Return the smallest, 5%, median, 95% and largest value of a column of numbers."""
    values = np.array([value for value in table.column(column).to_pylist() if value is not None], dtype=float)
    steps = (0, 5, 50, 95, 100)
    return {f"{step}%": round(float(np.percentile(values, step)), 4) for step in steps} if len(values) else {}


def parse_model(text: str, *, option: str) -> tuple[str, str, str]:
    """Return name, folder and label of `NAME=FOLDER[:LABEL]`. Raises DataError for anything else."""
    name, found, place = text.partition("=")
    if not found or not name.strip() or not place.strip():
        raise DataError(f"{option} {text!r}: write NAME=FOLDER or NAME=FOLDER:LABEL")
    before, colon, label = place.rpartition(":")
    if not colon or label.startswith("//") or "/" in label:
        return name.strip(), place.strip(), ""
    return name.strip(), before.strip(), label.strip()


def refuse_names(names: Sequence[str]) -> None:
    """Raise DataError for a column that is measured twice, or has the name of a column that every set has."""
    for name, count in Counter(names).items():
        if not name.isidentifier():
            raise DataError(f"column {name!r}: use a name of letters, digits and _")
        if name in _TAKEN:
            raise DataError(f"column {name!r}: every set has a column of this name. Choose another")
        if count > 1:
            raise DataError(
                f"column {name!r} is measured twice. Give each model a name of its own, NAME=FOLDER"
            )


def _blur_of(images: Sequence[Image.Image]) -> list[Any]:
    return [round(laplacian_variance(image), 3) for image in images]
