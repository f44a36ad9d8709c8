"""Cuts a part out of an image file and writes it as a lossless file."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from dreamfleet.datasets.image_options import MAX_PIXELS
from dreamfleet.datasets.images.images import open_with_alpha


def crop_file(
    data: bytes, box: tuple[float, float, float, float], *, uri: str, max_pixels: int = MAX_PIXELS
) -> bytes:
    """Return a part of an image as an uncompressed PNG; ``box``: left, top, right, bottom as fractions of the sides.

    The pixels are those of :func:`open_image`: rotated by EXIF and in sRGB. Transparency is kept. Raises DataError as
    open_image does.
    """
    colours, alpha = open_with_alpha(data, uri=uri, max_pixels=max_pixels)
    edges = pixel_box(box, colours.size)
    part = colours.crop(edges)
    if alpha is not None:
        part = _straight_colours(data, part, edges)
        part.putalpha(alpha.crop(edges))
    stream = io.BytesIO()
    part.save(stream, "PNG", compress_level=0)
    return stream.getvalue()


def pixel_box(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return a box of fractions as whole pixels (left, top, right, bottom), at least one pixel wide and high."""
    left, top = (min(round(box[i] * size[i]), size[i] - 1) for i in (0, 1))
    right, bottom = max(left + 1, round(box[2] * size[0])), max(top + 1, round(box[3] * size[1]))
    return left, top, min(right, size[0]), min(bottom, size[1])


def _straight_colours(data: bytes, over_white: Image.Image, edges: tuple[int, int, int, int]) -> Image.Image:
    """Return the colours of a transparent image before they are composited over white.

    An image with a colour profile or with 16 bits keeps the composited ones, whose conversion is not repeated here:
    its half transparent pixels then become lighter.
    """
    with Image.open(io.BytesIO(data)) as image:
        if image.info.get("icc_profile") or image.mode.startswith("I"):
            return over_white
        upright = ImageOps.exif_transpose(image)
        return upright.convert("RGBA").convert("RGB").crop(edges)
