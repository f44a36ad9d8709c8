"""Parses memory sizes."""

from __future__ import annotations

import re

from dreamfleet.datasets.errors import ResourceError


def parse_size(text: str, *, option: str) -> int:
    """Return the bytes of ``12GiB``, ``24GB``, ``8192MiB`` or ``12G`` (GiB). Raises ResourceError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", text, re.IGNORECASE)
    if not match or not match[2] or float(match[1]) == 0:
        raise ResourceError(f"{option} {text!r} is no memory size; write it like 12GiB, 24GB or 8192MiB")
    number, prefix, binary, unit = match.groups()
    base = 1000 if unit and not binary else 1024
    return int(float(number) * base ** ("kmgt".index(prefix.lower()) + 1))


def format_size(size: int) -> str:
    """Return a number of bytes in the largest unit that shows it well, such as ``1.4 GiB``."""
    if size < 2**20:
        return f"{size / 2**10:.0f} KiB"
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"
