"""Converts images with an embedded colour profile to sRGB."""

from __future__ import annotations

import io
import logging
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

log = logging.getLogger(__name__)

SAME_WITHIN = 2  # of 255; a profile that changes no colour by more than this is treated as sRGB
_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of a profile -> Pillow's mode


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image of mode RGB, L or CMYK to sRGB by its embedded profile; without one it is assumed to be sRGB.

    CMYK without a profile is converted by Pillow's formula. As in browsers, a broken profile or one for another colour
    space is ignored.
    """
    made: Image.Image
    mode, transform = _conversion(image.info.get("icc_profile"), image.mode)
    made = image.convert("RGB") if transform is None else transform.apply(image.convert(mode))
    made.info = {}  # otherwise the profile would be saved with the image, and applied again when it is loaded
    return made


def profile_name(data: bytes) -> str:
    """Return the name of an image's colour profile without decoding the image; "" if no profile changes it."""
    with Image.open(io.BytesIO(data)) as image:
        profile, mode = image.info.get("icc_profile"), image.mode
    mode = "L" if mode in ("1", "LA", "La", "I") or mode.startswith("I;16") else mode
    transform = _conversion(profile, mode if mode in _SPACES.values() else "RGB")[1]
    if transform is None or not isinstance(profile, bytes):
        return ""
    from PIL import ImageCms

    return ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).strip() or "unnamed"


def _conversion(profile: object, mode: str) -> tuple[str, Any]:
    """Return the mode that a profile applies to and its conversion to sRGB; grey images may have an RGB profile."""
    if isinstance(profile, bytes) and profile:
        for candidate in ("L", "RGB") if mode == "L" else (mode,):
            if (transform := _transform(profile, candidate)) is not None:
                return candidate, transform
    return mode, None


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> Any:
    """Return the conversion from a mode to sRGB by a profile; None if it would change nothing."""
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _SPACES.get(source.profile.xcolor_space.strip()) != mode:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "CMYK":
            return transform
        cube = _colours(mode)
        plain, made = (np.asarray(one, np.int16) for one in (cube.convert("RGB"), transform.apply(cube)))
        return transform if np.abs(plain - made).max() > SAME_WITHIN else None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError) as error:
        log.debug("ignored a colour profile: %s", error)
        return None


def _colours(mode: str) -> Image.Image:
    """Return a test image for a mode: all grey levels, or 9 x 9 x 9 colours."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1)
    return Image.fromarray(cube.reshape(27, 27, 3))
