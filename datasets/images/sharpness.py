"""Measures how sharp an image is."""

from __future__ import annotations

import numpy as np
from PIL import Image

LONGEST_SIDE = (
    1024  # pixels; larger images are reduced to it, so that values of different sizes are comparable
)


def laplacian_variance(image: Image.Image) -> float:
    """Return the variance of the Laplacian of an RGB image's luminance (0 to 255); low values mean blur.

    The kernel is the usual one of four neighbours (OpenCV's `Laplacian` of size 1), without the border. An image below
    3 x 3 pixels has the value 0.
    """
    grey = image.convert("L")
    if max(grey.size) > LONGEST_SIDE:
        grey.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BOX)
    if min(grey.size) < 3:
        return 0.0
    values = np.asarray(grey, dtype=np.float32)
    sides = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:]
    return float((sides - 4 * values[1:-1, 1:-1]).var())
