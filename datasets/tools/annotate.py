"""Applies models to the images of a set, in the runner's workers: for each image a value for each model."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.images.images import open_image
from dreamfleet.datasets.index.sources import read_image_file
from dreamfleet.datasets.processing.runner import Row, Workers, process, reading_ahead
from dreamfleet.datasets.tools.image_set import SetImage

AHEAD = 4  # batches that a worker gets at once: it decodes the next ones while a model computes

# A model applied to a batch of RGB images: a JSON value for each.
Describe = Callable[[Sequence[Image.Image]], list[Any]]
Makers = Mapping[str, Callable[[], Describe]]


class AnnotateWork:
    """Loads all models once, and applies them to batches of rows with the ``name`` and ``uri`` of an image."""

    def __init__(self, makers: Makers, *, batch_size: int) -> None:
        self._models = {name: make() for name, make in makers.items()}
        self._batch_size = batch_size

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Return for each row its name, uri and either ``sha256`` and ``values`` by model, or a ``reason``."""
        found: list[Row] = []
        threads = min(len(rows), len(os.sched_getaffinity(0)))
        with reading_ahead(_load, rows, threads=threads) as loaded:
            for start in range(0, len(rows), self._batch_size):
                batch = rows[start : start + self._batch_size]
                found += self._annotate(batch, [next(loaded) for _ in batch])
        return found

    def _annotate(
        self, rows: Sequence[Row], loaded: Sequence[tuple[Image.Image, str] | Exception]
    ) -> Iterator[Row]:
        images = [one[0] for one in loaded if not isinstance(one, Exception)]
        columns = {name: iter(model(images)) for name, model in self._models.items()} if images else {}
        for row, one in zip(rows, loaded, strict=True):
            answer = {"name": row["name"], "uri": row["uri"]}
            if isinstance(one, Exception):
                yield {**answer, "reason": str(one).removeprefix(f"{row['uri']}: ")}
            else:
                values = {name: next(column) for name, column in columns.items()}
                yield {**answer, "sha256": one[1], "values": values}


def annotate(
    images: Sequence[SetImage],
    makers: Makers,
    workers: Workers,
    *,
    batch_size: int,
    failed: dict[str, str],
    progress: Callable[[int, int], None],
) -> Iterator[Row]:
    """Yield a row of :class:`AnnotateWork` for each image that can be read, in any order. Raises as `process` does.

    The reasons of the other images are added to ``failed`` by name. ``progress`` is called with the numbers of images
    (done, all of them).
    """
    rows = ({"name": image.name, "uri": image.uri} for image in images)
    work = functools.partial(AnnotateWork, makers, batch_size=batch_size)
    at_once = max(1, min(AHEAD, -(-len(images) // (batch_size * max(1, workers.count)))))
    found = process(rows, work, workers, batch_size=batch_size * at_once, keeps=True)
    progress(0, len(images))
    for done, row in enumerate(found, 1):
        if "reason" in row:
            failed[row["name"]] = row["reason"]
        else:
            yield row
        progress(done, len(images))


def refuse_unreadable(failed: Mapping[str, str], images: Sequence[SetImage]) -> None:
    """Raise DataError if none of a set's images could be read."""
    if len(failed) == len(images):
        name, reason = next(iter(failed.items()))
        raise DataError(f"none of the {len(failed)} images could be read; {name}: {reason}")


def _load(row: Row) -> tuple[Image.Image, str] | Exception:
    try:
        data = read_image_file(row["uri"])
        return open_image(data, uri=row["uri"]), hashlib.sha256(data).hexdigest()
    except (DataError, StorageError) as error:
        return error
