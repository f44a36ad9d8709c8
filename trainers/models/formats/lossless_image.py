"""Writes lossless AVIF and JPEG XL images with imagecodecs, and reads JPEG XL, neither of which Pillow can do.

An AVIF is lossless only with the identity matrix (ITU-T H.273) instead of YUV, 4:4:4, 8 bits and the lossless option;
Pillow reads such files. The size of a JPEG XL image is read before decoding (ISO/IEC 18181-1, SizeHeader, and 18181-2,
boxes), and it is decoded into an array of that size, so that a small file cannot fill the memory.

Shapes: H, W height and width in pixels; C 3 or 4 channels.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dreamfleet.datasets.errors import FormatError

_CODESTREAM = b"\xff\x0a"
_CONTAINER = b"\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a"
_SIDE_BITS = (9, 13, 18, 30)
_RATIOS = ((1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # (width, height)


def encode(pixels_HW3: NDArray[np.uint8], suffix: str, where: str) -> bytes:
    """Encode an image losslessly as one of LOSSLESS_IMAGES. Raises FormatError if a package must be installed."""
    codecs = _imagecodecs(where)
    if suffix == ".jxl":
        return bytes(codecs.jpegxl_encode(pixels_HW3, lossless=True))
    best, identity = codecs.AVIF.QUALITY.LOSSLESS, codecs.AVIF.MATRIX_COEFFICIENTS.IDENTITY
    # libavif's default speed takes fifty times as long and makes files an eighth smaller.
    return bytes(codecs.avif_encode(pixels_HW3, best, speed=8, pixelformat="444", matrix=identity))


def decode_jxl(content: bytes, size: tuple[int, int], where: str) -> Image.Image:
    """Return the first image of a JPEG XL file in RGB or RGBA; ``size`` is its width and height.

    Raises FormatError if imagecodecs is not installed and for other pixel formats, RuntimeError for a damaged file.
    """
    codecs, (width, height) = _imagecodecs(where), size
    for channels in (3, 4):
        pixels_HWC = np.zeros((height, width, channels), dtype=np.uint8)
        try:
            return Image.fromarray(codecs.jpegxl_decode(content, 0, out=pixels_HWC))
        except (
            ValueError
        ):  # the file has another pixel format than the array, found in the header before decoding
            continue
    raise FormatError(f"{where}: only JPEG XL images in colour with 8 bits per value are supported.")


def is_jxl(content: bytes) -> bool:
    """Return whether the bytes are those of a JPEG XL file."""
    return content.startswith((_CODESTREAM, _CONTAINER))


def size_of(content: bytes) -> tuple[int, int] | None:
    """Return a JPEG XL file's width and height, given its first bytes; None if these are too few."""
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
    """Return the start of the codestream, extracted from the boxes if the file is a container."""
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


def require_codecs(formats: Iterable[str]) -> None:
    """Raise FormatError if an export format among ``formats`` (suffixes without a dot) needs a missing package."""
    for name in formats:
        if name in ("avif", "jxl"):
            _imagecodecs(f"train.export_formats: {name}")


def _imagecodecs(where: str) -> ModuleType:
    try:
        return importlib.import_module("imagecodecs")
    except ImportError:
        raise FormatError(
            f"{where}: JPEG XL and lossless AVIF need imagecodecs: pip install 'dreamfleet[formats]'; "
            "or use .png or .webp."
        ) from None
