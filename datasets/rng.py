"""Random numbers that depend only on a key, and not on the order in which they are drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

Part = int | str


def key(*parts: Part) -> int:
    """Return a hash of the parts in [0, 2**63) that is the same on every machine, rank and Python version.

    ``key(1)`` and ``key("1")`` differ, as do ``key("ab", "c")`` and ``key("a", "bc")``. For libraries that take a
    seed. Prefer :func:`numpy_rng`, which uses all bits: torch's CPU generator uses only 32 bits of a seed, so that
    among 77,000 keys a collision is more likely than not.
    """
    return int.from_bytes(_digest(parts, size=8), "little") >> 1


def numpy_rng(*parts: Part) -> np.random.Generator:
    """Return a numpy generator that depends only on the parts: Philox (counter-based) with a 128-bit key."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(parts, size=16), "little")))


def _digest(parts: Sequence[Part], *, size: int) -> bytes:
    digest = hashlib.blake2b(digest_size=size)
    for part in parts:
        text = f"{'i' if isinstance(part, int) else 's'}{part}".encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return digest.digest()
