"""Orders an epoch shard by shard within a mixing window, so that few shards are read at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

_CROP = re.compile(r"^edited://[^/]*/")  # an edited image is read from the file of the original


def shard_numbers(uris: Iterable[str]) -> np.ndarray:
    """Return for each image the number of the file that holds it; the URI of an image in a shard is `SHARD#PLACE`."""
    found: dict[str, int] = {}  # file -> number in the order of the images
    numbers = [found.setdefault(_CROP.sub("", uri).partition("#")[0], len(found)) for uri in uris]
    ranks = np.empty(len(found), np.int64)
    ranks[[found[file] for file in sorted(found)]] = np.arange(len(found))
    return ranks[np.asarray(numbers, np.int64)]


def shard_order(shards: np.ndarray, *, window: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random order of n images that stays near an order by shards; ``shards [n]`` are their shard numbers.

    The shards are put in a random order, and the images of each shard too. Each image is then moved by up to half of
    ``window`` places in either direction, so that about ``window`` images are mixed (as in MosaicML's `py1e`). Two
    images of one shard of m images are at most ``m + 2 * window`` places apart.
    """
    count = len(shards)
    ranks = rng.permutation(int(shards.max()) + 1)[shards]  # random place of each image's shard
    by_shard = np.lexsort((rng.random(count), ranks))
    moved = np.arange(count) + rng.uniform(-window / 2, window / 2, count)
    return by_shard[np.argsort(moved, kind="stable")]
