"""Statistics that need decoded pixels: format, colour profile, transparency, greyscale, and near duplicates."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dreamfleet.datasets.config import MAX_PIXELS
from dreamfleet.datasets.images.color_profile import profile_name
from dreamfleet.datasets.images.images import open_with_alpha
from dreamfleet.datasets.index.index import Row
from dreamfleet.datasets.index.sources import read_image_file
from dreamfleet.datasets.processing.runner import Workers, process, reading_ahead

ORIENTATION_TAG = 0x0112
GREY_WITHIN = 3  # maximum difference between the channels of a grey image, of 255
NEAR_BITS = 4  # maximum number of different bits in the 64-bit hashes of near duplicates
BATCH, READERS = 16, 4  # images that a Ray worker gets at once, and reads at the same time
PAIRS_AT_ONCE = 2**22  # pairs of hashes that are compared in one array operation: 32 MB


class PixelFacts(NamedTuple):
    """Properties of one decoded image."""

    format: str
    transparent: bool
    turned: bool
    grey: bool
    hash: int
    profile: str = ""  # name of a profile that is converted to sRGB


def difference_hash(image: Image.Image) -> int:
    """Return a 64-bit perceptual hash, which changes little with scaling and compression.

    This is the difference hash: one bit for each cell of an 8 x 8 grid, set if its right neighbour is brighter.
    """
    cells = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = (cells[:, 1:] > cells[:, :-1]).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def examine(data: bytes, *, uri: str, max_pixels: int = MAX_PIXELS) -> PixelFacts:
    """Decode an image and return its properties. Raises DataError naming ``uri``."""
    rgb, alpha = open_with_alpha(data, uri=uri, max_pixels=max_pixels)
    small = np.asarray(rgb.resize((64, 64), Image.Resampling.BOX), dtype=np.int16)
    with Image.open(io.BytesIO(data)) as image:
        kind = str(image.format)
        try:
            turned = image.getexif().get(ORIENTATION_TAG, 1) in range(2, 9)
        except Exception:  # noqa: BLE001  broken EXIF data raise anything, and the image may be good
            turned = False
    return PixelFacts(
        kind,
        alpha is not None and alpha.getextrema() != (255, 255),
        turned,
        int(np.ptp(small, axis=2).max()) <= GREY_WITHIN,
        difference_hash(rgb),
        profile_name(data),
    )


def examine_all(
    rows: Sequence[Row],
    max_pixels: int,
    progress: Callable[[int, int], None] | None,
    workers: Workers = Workers(),  # noqa: B008 - frozen
) -> Iterator[PixelFacts]:
    """Yield the properties of images in order, decoding several in parallel: by threads here, or by Ray workers.

    Raises DataError or StorageError for an image that cannot be read.
    """
    if workers.on_ray:
        yield from _examined_on_ray(rows, max_pixels, progress, workers)
        return

    def examine_row(row: Row) -> PixelFacts:
        return examine(read_image_file(row.uri), uri=row.uri, max_pixels=max_pixels)

    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="survey") as pool:
        for done, found in enumerate(pool.map(examine_row, rows), 1):
            yield found
            if progress is not None:
                progress(done, len(rows))


class ExamineWork:
    """Examines the images at the ``uri`` of rows."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return for each row its ``number`` and the ``facts`` about the image."""
        with reading_ahead(_read_row, rows, threads=READERS) as contents:
            return [
                {
                    "number": row["number"],
                    "facts": examine(data, uri=row["uri"], max_pixels=self._max_pixels),
                }
                for row, data in zip(rows, contents, strict=True)
            ]


def _examined_on_ray(
    rows: Sequence[Row], max_pixels: int, progress: Callable[[int, int], None] | None, workers: Workers
) -> Iterator[PixelFacts]:
    jobs = ({"number": number, "uri": row.uri} for number, row in enumerate(rows))
    found: dict[int, PixelFacts] = {}
    results = process(jobs, functools.partial(ExamineWork, max_pixels), workers, batch_size=BATCH)
    for done, row in enumerate(results, 1):
        found[row["number"]] = PixelFacts(*row["facts"])
        if progress is not None:
            progress(done, len(rows))
    yield from (found[number] for number in range(len(rows)))


def _read_row(row: dict[str, Any]) -> bytes:
    return read_image_file(row["uri"])


def copies(rows: Sequence[Row]) -> list[list[str]]:
    """Return groups of images with identical content, as lists of URIs."""
    places: dict[str, list[str]] = {}
    for row in rows:
        places.setdefault(row.sha256, []).append(row.uri)
    return sorted(sorted(group) for group in places.values() if len(group) > 1)


def near_copies(rows: Sequence[Row], facts: Sequence[PixelFacts]) -> list[list[str]]:
    """Return groups of near duplicates: URIs of different images connected by pairs whose hashes differ in few bits."""
    firsts = {row.sha256: number for number, row in reversed(list(enumerate(rows)))}
    # An image of one colour has the hash 0.
    members = [number for number in sorted(firsts.values()) if facts[number].hash]
    # Images of one scene share a few hashes. Each distinct hash is compared once.
    hashes, which = np.unique(
        np.array([facts[number].hash for number in members], dtype=np.uint64), return_inverse=True
    )
    leader = list(range(len(hashes)))

    def find_leader(number: int) -> int:
        while leader[number] != number:
            leader[number] = leader[leader[number]]
            number = leader[number]
        return number

    at_once = max(1, PAIRS_AT_ONCE // max(1, len(hashes)))
    for start in range(0, len(hashes), at_once):
        block = hashes[start : start + at_once]
        distance = np.bitwise_count(block[:, None] ^ hashes[None, start:])
        for one, other in zip(*np.nonzero(distance <= NEAR_BITS), strict=True):
            if one < other:
                leader[find_leader(start + int(other))] = find_leader(start + int(one))
    groups: dict[int, list[str]] = {}
    for number, member in zip(which.tolist(), members, strict=True):
        groups.setdefault(find_leader(number), []).append(rows[member].uri)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)
