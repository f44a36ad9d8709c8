"""Reads what the index stores about one image: hash, size, format, EXIF orientation, and its perceptual hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.images.image_formats import holds_embedding
from dreamfleet.datasets.images.images import check_image, read_header
from dreamfleet.datasets.images.masks import open_mask
from dreamfleet.datasets.images.perceptual_hash import perceptual_hash
from dreamfleet.datasets.index.exclusions import BadFile
from dreamfleet.datasets.index.sources import SourceImage, read_image_file, read_mask


class FileInfo(NamedTuple):
    """Facts about a file; only the hash for a mask. Width and height are in pixels after the EXIF rotation."""

    sha256: str
    width: int = 0
    height: int = 0
    bytes: int = 0  # 0: unknown
    format: str = ""  # "JPEG", "PNG" ...; "": unknown
    orientation: int = 0  # EXIF, 1 to 8; 0: unknown
    phash: str = ""  # 16 hex digits; "": not computed


# A function that returns the facts about the file at a URI, or None if the file must be read for them.
Known = Callable[[str], FileInfo | None]


class Inspected(NamedTuple):
    """An image that can be used, with the facts about it and the hash of its mask ("" without a mask)."""

    image: SourceImage
    info: FileInfo
    mask_sha256: str


class Inspection(NamedTuple):
    """How images are inspected: the largest number of pixels, whether to decode them, and whether to hash their look.

    Picklable, so that other processes can do it.
    """

    max_pixels: int
    check: bool
    phash: bool = False

    def recall(
        self, image: SourceImage, known: Known | None, phashes: Mapping[str, str] = MappingProxyType({})
    ) -> Inspected | None:
        """Return what is known about an image without reading it; None if it or its mask must be read.

        ``phashes`` are perceptual hashes by the hash of the file.
        """
        if self.check:
            return None
        info = FileInfo(image.sha256, image.width, image.height, image.bytes, image.format, image.orientation)
        if not all(info[:3]):
            info = (known(image.uri) if known else None) or info
        mask = image.mask_sha256
        if image.mask and not mask and known and (seen := known(image.mask)):
            mask = seen.sha256
        if not all(info[:3]) or (image.mask and not mask) or info.width * info.height > self.max_pixels:
            return None
        if self.phash and not info.phash:
            info = info._replace(phash=phashes.get(info.sha256, ""))
        return None if self.phash and not info.phash else Inspected(image, info, mask)

    def read(self, image: SourceImage) -> Inspected | BadFile:
        """Read an image and its mask; return the reason if either cannot be used."""
        try:
            return self._read(image)
        except (DataError, StorageError) as error:
            row = (image.columns or {}).get("row")
            where = f" (row {row} of its table)" if row is not None else ""
            return BadFile(image.uri, str(error).removeprefix(f"{image.uri}: ") + where)

    def _read(self, image: SourceImage) -> Inspected:
        uri = image.uri
        data, mask = read_image_file(uri), read_mask(image.mask) if image.mask else None
        info = describe(data, uri=uri, max_pixels=self.max_pixels)
        if self.check:
            check_image(data, uri=uri, max_pixels=self.max_pixels)
        if self.phash:
            info = info._replace(phash=perceptual_hash(data, uri=uri, max_pixels=self.max_pixels))
        if mask is not None:
            open_mask(mask, uri=f"its mask {image.mask}", max_pixels=self.max_pixels)
        if image.sha256 and image.sha256 != info.sha256:
            raise DataError(
                f"{uri}: its content has another sha256 than the source lists ({image.sha256[:16]}...)"
            )
        return Inspected(image, info, hashlib.sha256(mask.data).hexdigest() if mask is not None else "")


def describe(data: bytes, *, uri: str, max_pixels: int) -> FileInfo:
    """Return the facts about an image file without its perceptual hash. Raises DataError as read_header does."""
    header = read_header(data, uri=uri, max_pixels=max_pixels)
    if holds_embedding(data):
        raise DataError(f"{uri}: an embedding that is stored as an image. Move it out of the folder")
    return FileInfo(
        hashlib.sha256(data).hexdigest(),
        header.width,
        header.height,
        len(data),
        header.format,
        header.orientation,
    )
