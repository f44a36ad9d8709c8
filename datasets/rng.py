"""Random numbers keyed by what they belong to, never by the order in which they are drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

Part = int | str


def key(*parts: Part) -> int:
    """Hash the parts to a stable integer in [0, 2**63): the same on every machine, rank and Python version.

    A part's type counts: ``key(1)`` and ``key("1")`` differ, and so do ``key("ab", "c")`` and ``key("a", "bc")``.
    For libraries that ask for a seed; draw from :func:`numpy_rng`, which uses every bit (torch's CPU generator keeps
    32 bits of a seed, so that two of 77,000 keys are more likely equal than not).
    """
    return int.from_bytes(_digest(parts, size=8), "little") >> 1


def numpy_rng(*parts: Part) -> np.random.Generator:
    """Make a numpy generator that is a function of the parts alone: Philox, counter-based, with a key of 128 bits."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(parts, size=16), "little")))


def _digest(parts: Sequence[Part], *, size: int) -> bytes:
    digest = hashlib.blake2b(digest_size=size)
    for part in parts:
        text = f"{'i' if isinstance(part, int) else 's'}{part}".encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return digest.digest()
