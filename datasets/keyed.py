"""Random numbers keyed by what they belong to, never by the order in which they are drawn."""

from __future__ import annotations

import hashlib

import numpy as np

Part = int | str


def key(*parts: Part) -> int:
    """Hash the parts to a stable integer in [0, 2**63): the same on every machine, rank and Python version.

    A part's type counts: ``key(1)`` and ``key("1")`` differ, and so do ``key("ab", "c")`` and ``key("a", "bc")``.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = f"{'i' if isinstance(part, int) else 's'}{part}".encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest(), "little") >> 1


def numpy_rng(*parts: Part) -> np.random.Generator:
    """Make a numpy generator (Philox, counter-based) that is a function of the parts alone."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))
