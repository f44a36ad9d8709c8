"""Orders an epoch shard by shard within a mixing window, so that few shards are read at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

_CROP = re.compile(r"^edited://[^/]*/")  # an edited image is read from the file of the original


def shard_numbers(uris: Sequence[str]) -> np.ndarray:
    """Return for each image the number of the file that holds it; the URI of an image in a shard is `SHARD#PLACE`."""
    files = [_CROP.sub("", uri).partition("#")[0] for uri in uris]
    return np.unique(np.asarray(files, dtype=object).astype(str), return_inverse=True)[1].reshape(-1)


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
