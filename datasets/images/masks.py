"""How one use of a picture is cut from its file, and with it its loss weights: from an alpha channel or a mask file."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops

from dreamfleet.datasets.config import MAX_PIXELS
from dreamfleet.datasets.images.images import fit_image, open_with_alpha

OPAQUE = 255
# DreamArtist's attention maps: black is no weight, mid-grey (127) one, white five; times 51 to fit in a byte.
ATTENTION_WEIGHTS = [round(51 * (v / 127 if v <= 127 else 1 + 4 * (v - 127) / 128)) for v in range(256)]


class Mask(NamedTuple):
    """A mask's file; in an attention map grey counts as DreamArtist has it, else as it is."""

    data: bytes
    is_attention: bool = False


class ImageView(NamedTuple):
    """One use of one picture: its row in the index, where to crop (None: the middle), whether to mirror, how large.

    ``size`` is width and height in pixels; None: what all are cut to.
    """

    row: int
    crop: tuple[float, float] | None = None
    flip: bool = False
    size: tuple[int, int] | None = None


def cut_image(
    data: bytes,
    draw: ImageView,
    *,
    uri: str,
    size: int | tuple[int, int],
    max_pixels: int = MAX_PIXELS,
    weighted: bool = False,
    mask: Mask | None = None,
) -> np.ndarray:
    """Decode a picture and cut it as a draw asks: uint8 [H,W,3], or [H,W,4] where ``weighted``.

    The fourth channel is the weight of each pixel, cut in the same way: ``mask`` (grey, white counts, of any size),
    else the picture's alpha channel, else 255 everywhere. ``size`` is for draws without one. Raises DataError naming
    ``uri``.
    """

    def cut(image: Image.Image) -> np.ndarray:
        return fit_image(
            image, draw.size or size, center=draw.crop is None, crop_key=draw.crop, flip=draw.flip
        )

    rgb, weights = open_with_alpha(data, uri=uri, max_pixels=max_pixels)
    if not weighted:
        return cut(rgb)
    if mask is not None:
        weights = open_mask(mask, uri=f"the mask of {uri}", max_pixels=max_pixels)
    if weights is None:
        weights = Image.new("L", rgb.size, OPAQUE)
    if weights.size != rgb.size:
        weights = weights.resize(rgb.size, Image.Resampling.BILINEAR)
    return np.dstack([cut(rgb), cut(weights)])


def open_mask(mask: Mask, *, uri: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a mask: 8-bit grey, white counts; transparent parts are black. DataError naming ``uri``."""
    rgb, alpha = open_with_alpha(mask.data, uri=uri, max_pixels=max_pixels)
    grey = rgb.convert("L")
    if mask.is_attention:
        grey = grey.point(ATTENTION_WEIGHTS)
    return grey if alpha is None else ImageChops.multiply(grey, alpha)


def loss_weights(pixels: np.ndarray, cell: int) -> np.ndarray:
    """Average the weights [H,W] over each latent's ``cell`` x ``cell`` pixels -> float32 [1,H/cell,W/cell] of mean 1.

    Weights that are the same everywhere are 1 everywhere, zeros too. (The webui takes the smallest off first, and so
    divides 0 by 0 for an opaque picture.)
    """
    height, width = pixels.shape
    cells = pixels.reshape(height // cell, cell, width // cell, cell).mean((1, 3), dtype=np.float64)
    mean = cells.mean()
    weights = cells / mean if mean > 0 else np.ones_like(cells)
    return weights.astype(np.float32)[None]
