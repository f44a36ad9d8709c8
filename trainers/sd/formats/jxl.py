"""JPEG XL pictures: the plugin that lets Pillow read and write them, and their size told before anything is decoded.

The plugin decodes a whole picture when it opens one, so that a small file could fill the memory. Form: ISO/IEC 18181-1
(SizeHeader) and 18181-2 (boxes).
"""

from __future__ import annotations

import importlib

from dreamfleet.datasets.errors import FormatError

_CODESTREAM = b"\xff\x0a"
_CONTAINER = b"\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a"
_SIDE_BITS = (9, 13, 18, 30)
_RATIOS = ((1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # width to height


def require_plugin(where: str) -> None:
    """Make Pillow know JPEG XL. Raises FormatError saying what to install."""
    try:
        importlib.import_module("pillow_jxl")
    except ImportError:
        raise FormatError(
            f"{where}: JPEG XL pictures need Pillow's plugin: pip install 'dreamfleet[jxl]'; or use .png or .webp."
        ) from None


def is_jxl(content: bytes) -> bool:
    """Say whether these are a JPEG XL file's bytes."""
    return content.startswith((_CODESTREAM, _CONTAINER))


def size_of(content: bytes) -> tuple[int, int] | None:
    """Read a JPEG XL file's width and height from its first bytes; None when they are not there."""
    start = content if content.startswith(_CODESTREAM) else _codestream_in(content)
    bits = int.from_bytes(start[2:18], "little")

    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    if len(start) < 18:
        return None
    small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if small else take(_SIDE_BITS[take(2)]) + 1

    height = side()
    if ratio := take(3):
        across, down = _RATIOS[ratio - 1]
        return height * across // down, height
    return side(), height


def _codestream_in(content: bytes) -> bytes:
    """Find the first bytes of the codestream among a container's boxes."""
    place = 0
    while place + 8 <= len(content):
        size, kind = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        head = 8
        if size == 1:
            size, head = int.from_bytes(content[place + 8 : place + 16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            start = place + head + (4 if kind == b"jxlp" else 0)
            return content[start : start + 18]
        if size < head:
            break
        place += size
    return b""
