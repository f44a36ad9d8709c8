"""Crops an image for one use in training, together with its loss weights from an alpha channel or a mask file."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageChops

from dreamfleet.datasets.image_options import MAX_PIXELS
from dreamfleet.datasets.images.images import Decoded, decode_image, fit_image, open_with_alpha
from dreamfleet.datasets.images.resampling import RESAMPLINGS

if TYPE_CHECKING:
    from dreamfleet.datasets.config import DataConfig

OPAQUE = 255
# DreamArtist's attention maps: weight 0 for black, 1 for mid-grey (127) and 5 for white, multiplied by 51 to fill a
# byte.
ATTENTION_WEIGHTS = [round(51 * (v / 127 if v <= 127 else 1 + 4 * (v - 127) / 128)) for v in range(256)]


class Mask(NamedTuple):
    """A mask file; ``is_attention`` selects DreamArtist's mapping of grey values to weights."""

    data: bytes
    is_attention: bool = False


class ImageView(NamedTuple):
    """One use of an image: its row in the index, the position of the crop (None: centred), and whether it is flipped.

    ``size`` is width and height in pixels; None: the size given to :func:`cut_image`.
    """

    row: int
    crop: tuple[float, float] | None = None
    flip: bool = False
    size: tuple[int, int] | None = None


class OpenedView(NamedTuple):
    """A decoded image, and its loss weights if they are wanted: 8-bit grey, or None if they are 255 everywhere."""

    decoded: Decoded
    weighted: bool
    weights: Image.Image | None


def cut_image(
    data: bytes,
    view: ImageView,
    *,
    uri: str,
    size: int | tuple[int, int],
    resampling: str,
    max_pixels: int = MAX_PIXELS,
    weighted: bool = False,
    mask: Mask | None = None,
) -> np.ndarray:
    """Decode and crop an image as a view specifies; return uint8 [H,W,3], or [H,W,4] if ``weighted``.

    The fourth channel contains the loss weight of each pixel, cropped in the same way. It comes from ``mask``
    (greyscale of any size, white has full weight), otherwise from the image's alpha channel; without either it is 255
    everywhere. ``size`` applies to views without a size. ``resampling`` is a name in RESAMPLINGS. Raises DataError
    naming ``uri``.
    """
    target = view.size or ((size, size) if isinstance(size, int) else size)
    opened = open_view(
        data,
        uri=uri,
        size=target,
        resampling=resampling,
        max_pixels=max_pixels,
        weighted=weighted,
        mask=mask,
    )
    return cut_opened(opened, view, size=target, resampling=resampling)


def cut_for_training(
    content: bytes, view: ImageView, data: DataConfig, *, uri: str, mask: Mask | None = None
) -> np.ndarray:
    """Decode and crop an image with the options of a `data:` section; return what cut_image returns.

    It is weighted with ``data.alpha_mask``.
    """
    return cut_image(
        content,
        view,
        uri=uri,
        size=data.resolution,
        resampling=data.image_interpolation_mode,
        max_pixels=data.max_pixels,
        weighted=data.alpha_mask,
        mask=mask,
    )


def open_view(
    data: bytes,
    *,
    uri: str,
    size: tuple[int, int],
    resampling: str,
    max_pixels: int = MAX_PIXELS,
    weighted: bool = False,
    mask: Mask | None = None,
) -> OpenedView:
    """Decode an image and its loss weights for cut_opened, which cuts them to ``size``; see cut_image."""
    covering = size if RESAMPLINGS[resampling].scaled_decode else None
    decoded = decode_image(data, uri=uri, max_pixels=max_pixels, covering=covering)
    if not weighted:
        return OpenedView(decoded, False, None)
    weights = decoded.alpha
    if mask is not None:
        weights = open_mask(mask, uri=f"the mask of {uri}", max_pixels=max_pixels)
    if weights is not None and weights.size != decoded.size:
        weights = weights.resize(decoded.size, Image.Resampling.BILINEAR)
    return OpenedView(decoded, True, weights)


def cut_opened(opened: OpenedView, view: ImageView, *, size: tuple[int, int], resampling: str) -> np.ndarray:
    """Resize, crop and flip an image from open_view; return what cut_image returns."""

    def cut(image: Image.Image, part: Decoded | None = None) -> np.ndarray:
        return fit_image(
            image,
            size,
            center=view.crop is None,
            crop_key=view.crop,
            flip=view.flip,
            resample=RESAMPLINGS[resampling].filter,
            decoded=part,
        )

    pixels = cut(opened.decoded.image, opened.decoded)
    if not opened.weighted:
        return pixels
    if opened.weights is None:
        return np.dstack([pixels, np.full(pixels.shape[:2], OPAQUE, np.uint8)])
    return np.dstack([pixels, cut(opened.weights)])


def open_mask(mask: Mask, *, uri: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a mask to 8-bit grey; white has full weight, transparent parts are black. Raises DataError."""
    rgb, alpha = open_with_alpha(mask.data, uri=uri, max_pixels=max_pixels)
    grey = rgb.convert("L")
    if mask.is_attention:
        grey = grey.point(ATTENTION_WEIGHTS)
    return grey if alpha is None else ImageChops.multiply(grey, alpha)


def loss_weights(pixels: np.ndarray, cell: int) -> np.ndarray:
    """Average weights [H,W] over the ``cell`` x ``cell`` pixels of each latent cell: float32 [1,H/cell,W/cell], mean 1.

    Constant weights, including all zeros, become 1 everywhere. (The webui subtracts the minimum first, so that an
    opaque image gives 0 / 0.)
    """
    height, width = pixels.shape
    cells = pixels.reshape(height // cell, cell, width // cell, cell).mean((1, 3), dtype=np.float64)
    mean = cells.mean()
    weights = cells / mean if mean > 0 else np.ones_like(cells)
    return weights.astype(np.float32)[None]
