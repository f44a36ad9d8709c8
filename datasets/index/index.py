"""Builds the index of a run: an Arrow table with id, size, caption and hash of each image, and a list of bad files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa

from dreamfleet.datasets.config import MAX_PIXELS
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.images.image_formats import holds_embedding
from dreamfleet.datasets.images.images import check_image, read_header
from dreamfleet.datasets.images.masks import open_mask
from dreamfleet.datasets.index.edited_source import apply_edits
from dreamfleet.datasets.index.exclusions import BadFile, Skipped, summary
from dreamfleet.datasets.index.sources import (
    Listing,
    ScanOptions,
    SourceImage,
    find_source,
    read_image_file,
    read_mask,
)
from dreamfleet.datasets.storage.object_store import is_address
from dreamfleet.datasets.storage.storage import Storage

log = logging.getLogger(__name__)

_DEFAULTS = ScanOptions()
VERIFY_LIMIT = 2000  # sets of at most this many images are decoded completely, to find truncated files
LOGGED = 20  # maximum number of bad files that are logged individually
SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # first 16 hex digits of sha256; "-k" appended for the k-th further copy
        ("uri", pa.string()),  # absolute path, bucket address, or URI of a source
        ("width", pa.int32()),  # pixels, after the EXIF rotation
        ("height", pa.int32()),
        ("caption", pa.string()),  # null without a caption
        ("sha256", pa.string()),
        ("concept", pa.int32()),
        ("role", pa.string()),  # "instance" or "class"
        ("repeats", pa.int32()),
        ("mask", pa.string()),  # URI of the image's mask; null without one
        ("mask_sha256", pa.string()),
    ]
)


class Row(NamedTuple):
    """One image of an index; the fields are the columns of :data:`SCHEMA`."""

    id: str
    uri: str
    width: int
    height: int
    caption: str | None
    sha256: str
    concept: int
    role: str
    repeats: int
    mask: str | None = None
    mask_sha256: str | None = None


class FileInfo(NamedTuple):
    """Hash of a file, and its width and height in pixels after the EXIF rotation (0 for a mask)."""

    sha256: str
    width: int = 0
    height: int = 0


# A function that returns the hash and size of the file at a URI, or None if the file must be read for them.
Known = Callable[[str], FileInfo | None]


class Index:
    """The images of one or more sources, sorted by id. Independent of their location and of the listing order."""

    def __init__(
        self, table: pa.Table, *, bad: Sequence[BadFile] = (), skipped: Sequence[Skipped] = ()
    ) -> None:
        self.table = table
        self.bad = list(bad)
        self.skipped = list(skipped)  # files that were deliberately skipped
        self.others: Counter[str] = Counter()  # extension -> number of other files
        self.shared: dict[str, list[str]] = {}  # caption file -> images that share it

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def row(self, number: int) -> Row:
        """Return the image in row `number` (0-based)."""
        return Row(*(self.table.column(name)[number].as_py() for name in SCHEMA.names))

    def rows(self) -> list[Row]:
        """Return all images in order."""
        return [
            Row(*values)
            for values in zip(*(column.to_pylist() for column in self.table.columns), strict=True)
        ]

    def column(self, name: str) -> list[Any]:
        """Return a column as a list."""
        return self.table.column(name).to_pylist()

    def sizes(self) -> list[tuple[int, int]]:
        """Return the width and height of every image in pixels."""
        return list(zip(self.column("width"), self.column("height"), strict=True))

    def take(self, numbers: Sequence[int], captions: Sequence[str | None]) -> Index:
        """Return an index of the rows ``numbers``, in this order, with their captions replaced by ``captions``."""
        place = SCHEMA.get_field_index("caption")
        taken = self.table.take(pa.array(numbers, pa.int64()))
        captioned = taken.set_column(place, SCHEMA.field(place), pa.array(captions, pa.string()))
        return Index(captioned, bad=self.bad, skipped=self.skipped)

    @property
    def content_hash(self) -> str:
        """SHA-256 (hex) of ids, contents, captions, concepts, roles, repeats and masks, but not of locations."""
        digest = hashlib.sha256()
        for row in self.rows():
            seen = [row.id, row.sha256, row.caption, row.concept, row.role, row.repeats]
            seen += [row.mask_sha256] if row.mask_sha256 else []
            digest.update(json.dumps(seen, ensure_ascii=True).encode() + b"\n")
        return digest.hexdigest()

    @staticmethod
    def concat(indexes: Sequence[Index]) -> Index:
        """Return one index of the rows of several; copies of an image in different indexes also get "-k" ids."""
        rows = [(position, row) for position, index in enumerate(indexes) for row in index.rows()]
        rows.sort(key=lambda item: (item[1].sha256[:16], item[0], _copy_number(item[1].id)))
        bad = [bad for index in indexes for bad in index.bad]
        made = _assemble([row for _, row in rows], bad, [one for index in indexes for one in index.skipped])
        for index in indexes:
            made.others += index.others
            made.shared |= index.shared
        return made


def build_index(
    place: Storage | str | os.PathLike[str],
    options: ScanOptions = _DEFAULTS,
    *,
    concept: int = 0,
    role: str = "instance",
    repeats: int = 1,
    max_pixels: int = MAX_PIXELS,
    verify: bool | None = None,
    known: Known | None = None,
) -> Index:
    """Index the images at a URL: a folder on disk or in a bucket, or a URL that another source reads.

    Each file is read once, by a pool of threads, unless the source lists its hash and size or ``known(uri)`` returns
    them. With ``verify`` (None: for at most 2000 images) every image is decoded completely, so that truncated files are
    found before training. An image is left out and listed in ``.bad`` if it or its mask cannot be used.

    Raises DataError with the URL, the problem and the remedy if there is no usable image or the source itself is
    unusable; see :meth:`Source.scan`.
    """
    url = place.url if isinstance(place, Storage) else os.fspath(place)
    if is_address(url):
        url = Storage(url).url
    listing = apply_edits(find_source(url).scan(url, options), url, options.edits_for)
    check = len(listing.images) <= VERIFY_LIMIT if verify is None else verify

    def inspect(image: SourceImage) -> Row | BadFile:
        try:
            found = None if check else _recall(image, known, max_pixels)
            seen, mask = found or _read(image, max_pixels=max_pixels, check=check)
        except (DataError, StorageError) as error:
            return BadFile(image.uri, str(error).removeprefix(f"{image.uri}: "))
        sha256 = seen.sha256
        row = Row(
            sha256[:16], image.uri, seen.width, seen.height, image.caption, sha256, concept, role, repeats
        )
        return row if mask is None else row._replace(mask=image.mask, mask_sha256=mask.sha256)

    threads = 32 if "://" in url else 2 * (os.cpu_count() or 1)
    workers = min(32, threads, max(1, len(listing.images)))
    with ThreadPoolExecutor(workers, thread_name_prefix="index") as pool:
        found = list(pool.map(inspect, listing.images))
    rows = [item for item in found if isinstance(item, Row)]
    listing.bad = sorted([*listing.bad, *(item for item in found if isinstance(item, BadFile))])
    if not rows:
        raise DataError(_nothing_usable(url, listing))
    rows.sort(key=lambda row: row.sha256[:16])  # copies keep the order of the listing
    index = _assemble(rows, listing.bad, listing.skipped)
    index.others, index.shared = listing.others, listing.shared
    return index


def log_left_out(index: Index) -> None:
    """Log the files that an index leaves out: bad files as warnings, skipped files in one line."""
    for file in index.bad[:LOGGED]:
        log.warning("left out %s: %s", file.uri, file.reason)
    if len(index.bad) > LOGGED:
        log.warning("left out %d more files: `dreamfleet data inspect` lists them", len(index.bad) - LOGGED)
    if index.skipped:
        log.info("skipped %s", summary(index.skipped))


def _read(image: SourceImage, *, max_pixels: int, check: bool) -> tuple[FileInfo, FileInfo | None]:
    """Read an image and its mask. Raises DataError if either cannot be used, StorageError if it cannot be read."""
    uri = image.uri
    data, mask = read_image_file(uri), read_mask(image.mask) if image.mask else None
    header = read_header(data, uri=uri, max_pixels=max_pixels)
    if holds_embedding(data):
        raise DataError(f"{uri}: an embedding that is stored as an image. Move it out of the folder")
    if check:
        check_image(data, uri=uri, max_pixels=max_pixels)
    if mask is not None:
        open_mask(mask, uri=f"its mask {image.mask}", max_pixels=max_pixels)
    seen = FileInfo(hashlib.sha256(data).hexdigest(), header.width, header.height)
    if image.sha256 and image.sha256 != seen.sha256:
        raise DataError(
            f"{uri}: its content has another sha256 than the source lists ({image.sha256[:16]}...)"
        )
    return seen, FileInfo(hashlib.sha256(mask.data).hexdigest()) if mask is not None else None


def _recall(
    image: SourceImage, known: Known | None, max_pixels: int
) -> tuple[FileInfo, FileInfo | None] | None:
    """Return hash and size of an image and of its mask without reading them; None if one of them must be read."""
    listed = FileInfo(image.sha256, image.width, image.height), FileInfo(image.mask_sha256)
    seen = listed[0] if all(listed[0]) else known(image.uri) if known else None
    mask = listed[1] if image.mask_sha256 else known(image.mask) if known and image.mask else None
    if seen is None or (image.mask and mask is None) or seen.width * seen.height > max_pixels:
        return None
    return seen, mask


def _assemble(rows: Sequence[Row], bad: Sequence[BadFile], skipped: Sequence[Skipped] = ()) -> Index:
    """Return an index of rows sorted by id; copies of an image, which must be adjacent, are numbered in this order."""
    numbered: list[Row] = []
    copies = 0
    for row in rows:
        stem = row.sha256[:16]
        copies = copies + 1 if numbered and numbered[-1].sha256[:16] == stem else 0
        numbered.append(row._replace(id=f"{stem}-{copies}" if copies else stem))
    numbered.sort(key=lambda row: row.id)
    columns = list(zip(*numbered, strict=True)) or [()] * len(SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    return Index(pa.Table.from_arrays(arrays, schema=SCHEMA), bad=bad, skipped=skipped)


def _copy_number(row_id: str) -> int:
    return int(row_id.partition("-")[2] or 0)


def _nothing_usable(url: str, listing: Listing) -> str:
    skipped = f"; skipped: {summary(listing.skipped)}" if listing.skipped else ""
    if listing.bad:
        return (
            f"no usable image in {url}: all {len(listing.bad)} found are bad: {_some(listing.bad)}{skipped}. Replace "
            "or convert them, or name another folder"
        )
    count = listing.others.total()
    held = f"{count} other files" if count else "nothing else" if skipped else "nothing at all"
    return f"no image in {url}: it contains {held}{skipped}. Put images (.png, .jpg ...) there, or name another folder"


def _some(bad: Sequence[BadFile], most: int = 3) -> str:
    listed = "; ".join(f"{item.uri}: {item.reason}" for item in bad[:most])
    return listed + (f"; and {len(bad) - most} more" if len(bad) > most else "")
