"""How one use of a picture is cut from its file, and with it its loss weights: from an alpha channel or a mask file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops

from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.images import MAX_PIXELS, PICTURE_SUFFIXES, fit_picture, open_with_alpha
from dreamfleet.datasets.storage import Storage

MASK_ENDING = ".mask.png"
OPAQUE = 255


class PictureDraw(NamedTuple):
    """One use of one picture: its row in the index, where to crop (None: the middle), whether to mirror, how large.

    ``size`` is width and height in pixels; None: what all are cut to.
    """

    row: int
    crop: tuple[float, float] | None = None
    flip: bool = False
    size: tuple[int, int] | None = None


def find_masks(storage: Storage, names: Sequence[str], mask_dir: str | None = None) -> dict[str, str]:
    """Say which mask belongs to which of the files in a folder: picture's name -> mask's address.

    That is the picture of the same name in ``mask_dir``, whatever its format, else ``NAME.mask.png`` beside it.
    Raises DataError when ``mask_dir`` is not there or among the pictures, or when nothing in it fits any picture.
    """
    pictures = [name for name in names if name.lower().endswith(PICTURE_SUFFIXES)]
    stems = {os.path.splitext(name)[0] for name in pictures}
    masks = {
        name[: -len(MASK_ENDING)]: storage.path(name)
        for name in pictures
        if name.lower().endswith(MASK_ENDING) and name[: -len(MASK_ENDING)] in stems
    }
    if mask_dir is not None:
        masks |= _masks_in(Storage(mask_dir), stems, of=storage)
    return {name: masks[stem] for name in pictures if (stem := os.path.splitext(name)[0]) in masks}


def cut_picture(
    data: bytes,
    draw: PictureDraw,
    *,
    uri: str,
    size: int | tuple[int, int],
    max_pixels: int = MAX_PIXELS,
    weighted: bool = False,
    mask: bytes | None = None,
) -> np.ndarray:
    """Decode a picture and cut it as a draw asks: uint8 [H,W,3], or [H,W,4] where ``weighted``.

    The fourth channel is the weight of each pixel, cut in the same way: ``mask`` (grey, white counts, of any size),
    else the picture's alpha channel, else 255 everywhere. ``size`` is for draws without one. Raises DataError naming
    ``uri``.
    """

    def cut(image: Image.Image) -> np.ndarray:
        return fit_picture(
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


def open_mask(data: bytes, *, uri: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a mask: 8-bit grey, white counts; transparent parts are black. DataError naming ``uri``."""
    rgb, alpha = open_with_alpha(data, uri=uri, max_pixels=max_pixels)
    grey = rgb.convert("L")
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


def _masks_in(folder: Storage, stems: set[str], *, of: Storage) -> dict[str, str]:
    if f"{folder.url}/".startswith(f"{of.url}/"):
        raise DataError(
            f"data.mask_dir: {folder.url} lies inside the folder of pictures {of.url}, where masks would be trained on "
            "as pictures. Move it beside that folder, or name the masks NAME.mask.png"
        )
    try:
        if not folder.exists():
            raise DataError(f"data.mask_dir: folder {folder.url} does not exist. Check the path")
        names = [name for name in folder.list("", True) if name.lower().endswith(PICTURE_SUFFIXES)]
    except StorageError as error:
        raise DataError(f"data.mask_dir: {error}") from error
    found = {stem: folder.path(name) for name in names if (stem := os.path.splitext(name)[0]) in stems}
    if not found:
        raise DataError(
            f"data.mask_dir: none of the {len(names)} pictures in {folder.url} is called as a training picture. "
            "The mask of cat.jpg is cat.png or cat.jpg there, in the same subfolder"
        )
    return found
