"""Reads and decodes the images of an image stream, in Ray Data tasks."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from dreamfleet.datasets.environment import apply_variables
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.images.images import open_image
from dreamfleet.datasets.images.masks import ImageView, cut_image
from dreamfleet.datasets.images.vision_transform import Fit
from dreamfleet.datasets.index.sources import read_image_file, read_mask


def decode_batch(
    batch: dict[str, np.ndarray],
    *,
    max_pixels: int,
    weighted: bool = False,
    fit: Fit | None = None,
    sent: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, np.ndarray]:
    """Read, decode and crop a batch of jobs, each to its size; with ``fit``, apply it to the images instead.

    The result has "pixels" (as bytes, since images of a block may differ in size), "error" (the reason why an image
    could not be decoded) and "failure" (why a file could not be read); both are "" for good images. ``sent`` are the
    variables from environment.variables_to_send.
    """
    apply_variables(sent)
    images, heights, errors, failures = [], [], [], []
    names = ("uri", "mask", "center", "x", "y", "flip", "width", "height")
    for uri, mask, center, x, y, flip, width, height in zip(*(batch[name] for name in names), strict=True):
        draw = ImageView(0, None if center else (float(x), float(y)), bool(flip), (int(width), int(height)))
        pixels, error, failure = None, "", ""
        try:
            pixels, error = decode_one(
                str(uri), draw, mask=str(mask) or None, max_pixels=max_pixels, weighted=weighted, fit=fit
            )
        except StorageError as storage_error:  # returned as data, since Ray would wrap an exception
            failure = str(storage_error)
        images.append(b"" if pixels is None else pixels.tobytes())
        heights.append(0 if pixels is None else len(pixels))
        errors.append(error)
        failures.append(failure)
    return {
        "position": batch["position"],
        "pixels": np.array(images, dtype=object),
        "height": np.array(heights),
        "error": np.array(errors, dtype=object),
        "failure": np.array(failures, dtype=object),
    }


def decode_one(
    uri: str, draw: ImageView, *, mask: str | None, max_pixels: int, weighted: bool, fit: Fit | None = None
) -> tuple[np.ndarray | None, str]:
    """Read an image and crop it or apply ``fit``; return uint8 [H,W,C] and "", or None and why it cannot be decoded.

    Raises StorageError if the file cannot be read: a failing disk or bucket must not change the training data.
    """
    try:
        if fit is not None:
            return np.asarray(
                fit(open_image(read_image_file(uri), uri=uri, max_pixels=max_pixels)).convert("RGB")
            ), ""
        assert draw.size is not None
        return cut_image(
            read_image_file(uri),
            draw,
            uri=uri,
            size=draw.size,
            max_pixels=max_pixels,
            weighted=weighted,
            mask=read_mask(mask) if weighted and mask else None,
        ), ""
    except DataError as error:
        return None, str(error)
