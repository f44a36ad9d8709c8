"""Finds duplicates in an index table: identical files, and images with nearly equal perceptual hashes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa

BITS = 64
MOST_ALIKE = (
    4096  # rows with an equal part of their hashes that are compared at once: 16 million pairs, 128 MB
)


def first_of_equals(table: pa.Table) -> list[bool | str]:
    """Return for each row True, or the URI of an earlier row with the same content."""
    first: dict[str, str] = {}
    pairs = zip(table.column("sha256").to_pylist(), table.column("uri").to_pylist(), strict=True)
    return [True if (kept := first.setdefault(digest, uri)) == uri else f"of {kept}" for digest, uri in pairs]


def first_of_near(table: pa.Table, distance: int) -> list[bool | str]:
    """Return for each row True, or the URI of the larger image that its hash differs from in ``distance`` bits or less.

    The image with the most pixels is kept, then the first. Rows without a hash, and plain images, whose hashes are
    all alike, are kept.
    """
    uris, texts = table.column("uri").to_pylist(), table.column("phash").to_pylist()
    usable = [row for row, text in enumerate(texts) if text and len(set(text)) > 2]
    pixels = [w * h for w, h in zip(*(table.column(n).to_pylist() for n in ("width", "height")), strict=True)]
    order = sorted(usable, key=lambda row: (-pixels[row], row))
    hashes = np.array([int(texts[row], 16) for row in order], np.uint64)
    distinct, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    near: dict[int, list[int]] = {}
    for place, one in enumerate(first[which].tolist()):
        if one != place:
            near[place] = [one]
    ranks = np.argsort(first)  # distinct hashes in the order of their first rows
    for one, other in _near_pairs(distinct[ranks], distance):
        near.setdefault(int(first[ranks[other]]), []).append(int(first[ranks[one]]))
    kept: list[bool | str] = [True] * len(uris)
    dropped: set[int] = set()
    for place in sorted(near):  # larger images first; a dropped image drops no other
        if keeper := [one for one in near[place] if one not in dropped]:
            dropped.add(place)
            kept[order[place]] = f"of {uris[order[min(keeper)]]}"
    return kept


def _near_pairs(hashes: np.ndarray, distance: int) -> Iterator[tuple[int, int]]:
    """Yield the pairs (i, j), i < j, whose hashes differ in at most ``distance`` bits; some more than once.

    Of ``distance`` + 1 parts of two such hashes, one part is equal, so only rows with an equal part are compared.
    """
    edges = np.linspace(0, BITS, distance + 2).astype(int)
    for low, high in pairwise(edges.tolist()):
        mask = np.uint64((1 << (high - low)) - 1)
        parts = (hashes >> np.uint64(low)) & mask
        order = np.argsort(parts, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(parts[order]) != 0]) if len(order) else np.array([], int)
        for start, end in zip(starts, np.r_[starts[1:], len(order)], strict=True):
            if end - start > 1:
                yield from _pairs_within(hashes, order[start:end], distance)


def _pairs_within(hashes: np.ndarray, rows: np.ndarray, distance: int) -> Iterator[tuple[int, int]]:
    step = max(1, MOST_ALIKE**2 // len(rows))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        different = np.bitwise_count(hashes[block][:, None] ^ hashes[rows][None, :])
        for one, other in zip(*np.nonzero(different <= distance), strict=True):
            if block[one] < rows[other]:
                yield int(block[one]), int(rows[other])
