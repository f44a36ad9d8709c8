"""Applies the edits of a set to the images that its source lists; the source ``edited`` reads cropped images.

``edited://0.1,0,0.9,1//data/a.jpg`` is the part from 10 % to 90 % of the width of /data/a.jpg. Its bytes are those of a
lossless file of that part, so every reader of an index (cache, stream, resident images, metrics) handles it as any
other image, and its hash differs from that of the whole image.
"""

from __future__ import annotations

import logging

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.images.crop_file import crop_file
from dreamfleet.datasets.index.edits import Box, Edit, EditTable, check_box
from dreamfleet.datasets.index.exclusions import Skipped
from dreamfleet.datasets.index.sources import Listing, ScanOptions, Source, SourceImage, read_image_file

log = logging.getLogger(__name__)

SCHEME = "edited"
EXCLUDED = "excluded by the set's edits"


class EditedSource(Source):
    """Reads parts of images and masks that other sources read."""

    def matches(self, url: str) -> bool:
        """Return False: no set is named by such a URL."""
        return False

    def scan(self, url: str, options: ScanOptions) -> Listing:
        """Raise DataError: these URLs name single images."""
        raise DataError(f"{url}: a part of an image, not an image set. Name the set itself")

    def read(self, uri: str) -> bytes:
        """Return a lossless image file of the part. Raises StorageError, DataError if it cannot be decoded."""
        box, original = split_uri(uri)
        return crop_file(read_image_file(original), box, uri=original)


def edited_uri(uri: str, box: Box) -> str:
    """Return the URI of a part of the image at a URI."""
    return f"{SCHEME}://{','.join(f'{value:.6f}'.rstrip('0').rstrip('.') for value in box)}/{uri}"


def split_uri(uri: str) -> tuple[Box, str]:
    """Return the part and the URI of the image that :func:`edited_uri` was given. Raises DataError."""
    numbers, _, original = uri.removeprefix(f"{SCHEME}://").partition("/")
    try:
        box = check_box(numbers.split(","))
    except ValueError as error:
        raise DataError(f"{uri}: not the address of a part of an image ({error})") from error
    assert box is not None
    return box, original


def apply_edits(listing: Listing, url: str, data: DataConfig | None) -> Listing:
    """Return a listing with the edits that are stored beside the set at ``url``; unchanged if ``data`` is None.

    Excluded images leave it and are counted in ``skipped``; captions and masks are replaced; the URIs of cropped images
    and of their masks become ``edited://...``. Edits of images that are not listed have no effect. Raises DataError for
    a broken table.
    """
    if data is None:
        return listing
    table = EditTable(url)
    if not table.edits:
        return listing
    kept, excluded = [], 0
    counts = {"captions": 0, "crops": 0, "masks": 0}
    for image in listing.images:
        edit = table.of(image.uri)
        if edit is not None and edit.excluded:
            excluded += 1
            continue
        if edit is not None:
            image = edit_image(image, edit, table, data)
            counts["captions"] += edit.caption is not None
            counts["crops"] += edit.crop is not None or edit.focus is not None
            counts["masks"] += edit.mask is not None
        kept.append(image)
    listing.images = kept
    if excluded:
        listing.skipped.append(Skipped(url, EXCLUDED, excluded))
    named = ", ".join(f"{name}: {count}" for name, count in {**counts, "excluded": excluded}.items() if count)
    log.info("%s: edits of the set are applied (%s)", url, named or "none of them is of a listed image")
    return listing


def edit_image(image: SourceImage, edit: Edit, table: EditTable, data: DataConfig) -> SourceImage:
    """Return a listed image with its edits; hashes and sizes of changed files become unknown."""
    if edit.caption is not None:
        image = image._replace(caption=edit.caption or None)
    if edit.mask is not None:
        image = image._replace(mask=table.mask_uri(edit), mask_sha256="")
    if box := edit.box(data):
        mask = edited_uri(image.mask, box) if image.mask else None
        image = image._replace(uri=edited_uri(image.uri, box), mask=mask, mask_sha256="")
        image = image._replace(sha256="", width=0, height=0, bytes=0, format="", orientation=0)
    return image


def original_uri(uri: str) -> str:
    """Return the URI of the image that a URI of an index names, without its crop."""
    return split_uri(uri)[1] if uri.startswith(f"{SCHEME}://") else uri
