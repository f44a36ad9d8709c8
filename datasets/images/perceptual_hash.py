"""Perceptual hashes of images, by which near duplicates are found: ImageHash's DCT hash."""

from __future__ import annotations

import io

from PIL import Image

from dreamfleet.datasets.images.images import open_image

SIDE = 32  # pixels of the grey image that is transformed, as in ImageHash's phash
DRAFT = 256  # JPEG files are decoded at the smallest size that has this many pixels on a side


def perceptual_hash(data: bytes, *, uri: str, max_pixels: int) -> str:
    """Return the 64-bit DCT hash of an image as 16 hex digits: few bits change with scale, compression and tone.

    Source: pHash's DCT hash (Zauner 2010) as implemented by the ImageHash package. Raises DataError for an image that
    cannot be decoded.
    """
    import imagehash  # with scipy, which takes 0.3 s to import

    return str(imagehash.phash(open_image(_shrunk(data), uri=uri, max_pixels=max_pixels)))


def _shrunk(data: bytes) -> bytes:
    """Return a JPEG file as a smaller bitmap, decoded at a reduced scale; other files unchanged."""
    if data[:2] != b"\xff\xd8":
        return data
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if image.mode not in ("L", "RGB") or image.getexif().get(0x0112, 1) != 1:
                return data
            image.draft(None, (DRAFT, DRAFT))
            image.load()
            small = io.BytesIO()
            image.convert("RGB").save(small, "BMP")
            return small.getvalue()
    except Exception:  # noqa: BLE001  the reader of whole images explains what is wrong
        return data
