"""The images of the page: thumbnails, whole images, masks, and images at training size."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image

from dreamfleet.cluster.browse.image_table import ImageTable
from dreamfleet.datasets.images.crop_file import pixel_box
from dreamfleet.datasets.images.images import fit_image, open_image
from dreamfleet.datasets.images.masks import ImageView, cut_image, open_mask
from dreamfleet.datasets.index.edited_source import edited_uri
from dreamfleet.datasets.index.sources import read_image_file, read_mask

THUMBNAIL, WHOLE = 224, 1280  # longest side in pixels
KEPT = 1200  # thumbnails in memory, of about 15 kB each

Content = tuple[bytes, str]  # an image file and its media type


class Renderer:
    """Draws images of a table as PNG or JPEG files. Raises DataError or StorageError for unreadable ones."""

    def __init__(self, table: ImageTable):
        self.table = table
        self._thumbnail = lru_cache(KEPT)(self._draw_thumbnail)

    def thumbnail(self, row: int) -> Content:
        """Return the part of an image that is trained, small."""
        return self._thumbnail(row, self.table.edit_of(row).box(self.table.data), self.table.size(row))

    def whole(self, row: int) -> Content:
        """Return the whole image, upright and scaled down if it is large."""
        image = self._open(row)
        image.thumbnail((WHOLE, WHOLE))
        return as_jpeg(image)

    def fitted(self, row: int) -> Content:
        """Return an image at its training size as a run without random crops and flips reads it."""
        return as_png(self._cut(row)[..., :3])

    def weights(self, row: int) -> Content:
        """Return the loss weights of an image at its training size, white is the full weight."""
        return as_png(self._cut(row)[..., 3])

    def mask(self, row: int) -> Content:
        """Return an image's mask in the shape of the whole image; white without one."""
        place = self.table.mask(row)
        width, height = self.table.original_size(row)
        scale = min(1.0, WHOLE / max(width, height))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        if place is None:
            return as_png(np.full((size[1], size[0]), 255, np.uint8))
        grey = open_mask(read_mask(place), uri=place, max_pixels=self.table.data.max_pixels)
        return as_png(np.asarray(grey.resize(size, Image.Resampling.BILINEAR)))

    def _draw_thumbnail(
        self, row: int, box: tuple[float, float, float, float] | None, size: tuple[int, int]
    ) -> Content:
        image = self._open(row, least=2 * THUMBNAIL if box is None else None)
        if box is not None:
            image = image.crop(pixel_box(box, image.size))
        scale = THUMBNAIL / max(size)
        small = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
        return as_jpeg(Image.fromarray(fit_image(image, small)), quality=82)

    def _open(self, row: int, *, least: int | None = None) -> Image.Image:
        """Decode an image; with ``least``, a JPEG may be decoded smaller, but with at least so many pixels a side."""
        uri = self.table.uri(row)
        data = read_image_file(uri)
        if least is not None and data[:2] == b"\xff\xd8" and (small := _smaller_jpeg(data, least)):
            data = small
        return open_image(data, uri=uri, max_pixels=self.table.data.max_pixels)

    def _cut(self, row: int) -> np.ndarray:
        data, uri, mask = self.table.data, self.table.uri(row), self.table.mask(row)
        if box := self.table.edit_of(row).box(data):
            uri, mask = edited_uri(uri, box), edited_uri(mask, box) if mask else None
        return cut_image(
            read_image_file(uri),
            ImageView(row, None, False, self.table.size(row)),
            uri=uri,
            size=data.resolution,
            resampling=data.image_interpolation_mode,
            max_pixels=data.max_pixels,
            weighted=True,
            mask=read_mask(mask) if mask else None,
        )


def as_png(pixels: np.ndarray) -> Content:
    """Return pixels, uint8 [H,W] or [H,W,3], as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG", compress_level=1)
    return stream.getvalue(), "image/png"


def as_jpeg(image: Image.Image, *, quality: int = 90) -> Content:
    """Return an RGB or grey image as a JPEG file."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue(), "image/jpeg"


def _smaller_jpeg(data: bytes, least: int) -> bytes | None:
    """Return a JPEG decoded at a half, quarter or eighth of its size as an uncompressed file with its EXIF and profile.

    None if it is not much larger than ``least`` pixels or is broken, which the complete decoder then reports.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            if min(image.size) < 2 * least or image.mode not in ("RGB", "L"):
                return None
            image.draft(image.mode, (least, least))
            exif, profile = image.getexif(), image.info.get("icc_profile")
            image.load()
            stream = io.BytesIO()
            image.save(stream, "PNG", compress_level=0, exif=exif, icc_profile=profile)
            return stream.getvalue()
    except Exception:  # noqa: BLE001  Pillow raises nearly anything for broken data
        return None
