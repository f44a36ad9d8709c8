"""What the pixels of images tell: format, colour profile, transparency, greys, and which are copies of each other."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from dreamfleet.datasets.config import MAX_PIXELS
from dreamfleet.datasets.images.color_profile import profile_name
from dreamfleet.datasets.images.images import open_with_alpha
from dreamfleet.datasets.index.index import Row
from dreamfleet.datasets.index.sources import read_image_file

ORIENTATION_TAG = 0x0112
GREY_WITHIN = 3  # the channels of a grey picture differ by no more, of 255
NEAR_BITS = 4  # pictures whose hashes differ in no more of 64 bits are nearly the same
PAIRS_AT_ONCE = 2**22  # of hashes that are compared: 32 MB


class Look(NamedTuple):
    """What the pixels of one picture tell."""

    format: str
    transparent: bool
    turned: bool
    grey: bool
    hash: int
    profile: str = ""  # that is converted to sRGB


def difference_hash(image: Image.Image) -> int:
    """Hash a picture to 64 bits that stay nearly the same under scaling and compression.

    The difference hash: whether each cell of an 8 x 8 grid is darker than its right neighbour.
    """
    cells = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = (cells[:, 1:] > cells[:, :-1]).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def look_at(data: bytes, *, uri: str, max_pixels: int = MAX_PIXELS) -> Look:
    """Decode a picture to tell what its header does not. DataError naming ``uri``."""
    rgb, alpha = open_with_alpha(data, uri=uri, max_pixels=max_pixels)
    small = np.asarray(rgb.resize((64, 64), Image.Resampling.BOX), dtype=np.int16)
    with Image.open(io.BytesIO(data)) as image:
        kind = str(image.format)
        try:
            turned = image.getexif().get(ORIENTATION_TAG, 1) in range(2, 9)
        except Exception:  # noqa: BLE001  broken EXIF data raise anything; the picture itself is good
            turned = False
    return Look(
        kind,
        alpha is not None and alpha.getextrema() != (255, 255),
        turned,
        int(np.ptp(small, axis=2).max()) <= GREY_WITHIN,
        difference_hash(rgb),
        profile_name(data),
    )


def look_at_all(
    rows: Sequence[Row], max_pixels: int, progress: Callable[[int, int], None] | None
) -> Iterator[Look]:
    """Decode images, several at once -> what each tells, in their order."""

    def look(row: Row) -> Look:
        return look_at(read_image_file(row.uri), uri=row.uri, max_pixels=max_pixels)

    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="survey") as pool:
        for done, found in enumerate(pool.map(look, rows), 1):
            yield found
            if progress is not None:
                progress(done, len(rows))


def copies(rows: Sequence[Row]) -> list[list[str]]:
    """Group images of the same content."""
    places: dict[str, list[str]] = {}
    for row in rows:
        places.setdefault(row.sha256, []).append(row.uri)
    return sorted(sorted(group) for group in places.values() if len(group) > 1)


def near_copies(rows: Sequence[Row], looks: Sequence[Look]) -> list[list[str]]:
    """Group pictures of different files whose hashes differ in a few bits, through any chain of such pairs."""
    firsts = {row.sha256: number for number, row in reversed(list(enumerate(rows)))}
    # A flat picture has no differences to hash.
    members = [number for number in sorted(firsts.values()) if looks[number].hash]
    # Many a set is of one scene: each hash is compared once, however many pictures have it.
    hashes, which = np.unique(
        np.array([looks[number].hash for number in members], dtype=np.uint64), return_inverse=True
    )
    leader = list(range(len(hashes)))

    def lead(number: int) -> int:
        while leader[number] != number:
            leader[number] = leader[leader[number]]
            number = leader[number]
        return number

    at_once = max(1, PAIRS_AT_ONCE // max(1, len(hashes)))
    for start in range(0, len(hashes), at_once):
        block = hashes[start : start + at_once]
        apart = np.bitwise_count(block[:, None] ^ hashes[None, start:])
        for one, other in zip(*np.nonzero(apart <= NEAR_BITS), strict=True):
            if one < other:
                leader[lead(start + int(other))] = lead(start + int(one))
    groups: dict[int, list[str]] = {}
    for number, member in zip(which.tolist(), members, strict=True):
        groups.setdefault(lead(number), []).append(rows[member].uri)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)
