"""Folders of images to one Arrow table: stable id, size, caption and hash of each; what is left out is reported."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa

from dreamfleet.datasets.config import MAX_PIXELS, Concept, DataConfig
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.images.image_formats import holds_embedding
from dreamfleet.datasets.images.images import check_image, read_header
from dreamfleet.datasets.images.masks import open_mask, read_mask
from dreamfleet.datasets.index.caption_files import Captions, refuse_all
from dreamfleet.datasets.index.exclusions import BadFile, Skipped, summary
from dreamfleet.datasets.index.image_folder import CAPTION_EXTENSIONS, ImageFolder
from dreamfleet.datasets.storage.storage import Storage

__all__ = ["BadFile", "Concept", "DataConfig", "Index", "Row", "build_index"]

log = logging.getLogger(__name__)

VERIFY_LIMIT = 2000  # up to so many images are decoded at index time, to find those cut short
LOGGED = 20  # bad files that are logged one by one
SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # first 16 hex digits of sha256; "-k" appended for the k-th further copy
        ("uri", pa.string()),  # absolute path, or address in a bucket
        ("width", pa.int32()),  # pixels, after the EXIF turn
        ("height", pa.int32()),
        ("caption", pa.string()),  # null where the picture has none of its own
        ("sha256", pa.string()),
        ("concept", pa.int32()),
        ("role", pa.string()),  # "instance" or "class"
        ("repeats", pa.int32()),
        ("mask", pa.string()),  # address of the picture's mask; null where it has none
        ("mask_sha256", pa.string()),
    ]
)


class Row(NamedTuple):
    """One picture of an index."""

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


class Seen(NamedTuple):
    """What was found in a file; sizes in pixels after the EXIF turn, 0 of a mask."""

    sha256: str
    width: int = 0
    height: int = 0


Known = Callable[
    [str], Seen | None
]  # what is in the file at an address, where that is known without reading it


class Index:
    """The pictures of one or more folders, sorted by id, whatever their place or listing order."""

    def __init__(
        self, table: pa.Table, *, bad: Sequence[BadFile] = (), skipped: Sequence[Skipped] = ()
    ) -> None:
        self.table = table
        self.bad = list(bad)
        self.skipped = list(skipped)  # files that are rightly passed over

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def row(self, number: int) -> Row:
        """The picture in row `number` (0-based)."""
        return Row(*(self.table.column(name)[number].as_py() for name in SCHEMA.names))

    def rows(self) -> list[Row]:
        """All pictures, in order."""
        return [
            Row(*values)
            for values in zip(*(column.to_pylist() for column in self.table.columns), strict=True)
        ]

    def column(self, name: str) -> list[Any]:
        """One column as a list."""
        return self.table.column(name).to_pylist()

    def sizes(self) -> list[tuple[int, int]]:
        """Return the width and height of every image in pixels."""
        return list(zip(self.column("width"), self.column("height"), strict=True))

    def take(self, numbers: Sequence[int], captions: Sequence[str | None]) -> Index:
        """The pictures in some rows, in this order, with these captions in place of their own."""
        place = SCHEMA.get_field_index("caption")
        taken = self.table.take(pa.array(numbers, pa.int64()))
        captioned = taken.set_column(place, SCHEMA.field(place), pa.array(captions, pa.string()))
        return Index(captioned, bad=self.bad, skipped=self.skipped)

    @property
    def content_hash(self) -> str:
        """sha256 (hex) over ids, contents, captions, concepts, roles, repeats and masks; not over places."""
        digest = hashlib.sha256()
        for row in self.rows():
            seen = [row.id, row.sha256, row.caption, row.concept, row.role, row.repeats]
            seen += [row.mask_sha256] if row.mask_sha256 else []
            digest.update(json.dumps(seen, ensure_ascii=True).encode() + b"\n")
        return digest.hexdigest()

    @staticmethod
    def concat(indexes: Sequence[Index]) -> Index:
        """One index of several. Copies of a picture across them get further "-k" ids."""
        rows = [(position, row) for position, index in enumerate(indexes) for row in index.rows()]
        rows.sort(key=lambda item: (item[1].sha256[:16], item[0], _copy_number(item[1].id)))
        bad = [bad for index in indexes for bad in index.bad]
        return _assemble([row for _, row in rows], bad, [one for index in indexes for one in index.skipped])


def build_index(
    folder: Storage | str,
    *,
    concept: int = 0,
    role: str = "instance",
    caption_extension: Sequence[str] = CAPTION_EXTENSIONS,
    caption_column: str | None = None,
    recursive: bool = True,
    max_pixels: int = MAX_PIXELS,
    repeats: int = 1,
    verify: bool | None = None,
    apart: Mapping[str, str] = MappingProxyType({}),
    mask_dir: str | None = None,
    known: Known | None = None,
) -> Index:
    """Index the images of a folder on disk or in a bucket.

    Which files belong together is :class:`ImageFolder`'s to say. Each file is read once, by a pool of threads, unless
    ``known(address)`` says what is in it. With ``verify`` (None: up to 2000 images) every pixel is decoded, so that an
    image cut short is found now. Bad images, and those whose mask is bad, are listed in ``.bad`` and left out.
    ``apart`` names folders that hold something else, and what.

    Raises DataError, naming the folder, what is wrong and the remedy, when the folder is not there or holds no usable
    image, and one that names all captions that are not UTF-8 and all tables that are broken.
    """
    files = ImageFolder(
        folder, recursive=recursive, caption_extension=caption_extension, mask_dir=mask_dir, apart=apart
    )
    storage, bad = files.storage, files.bad
    check = len(files.images) <= VERIFY_LIMIT if verify is None else verify
    captions = Captions(files, caption_column)

    def look(name: str) -> Row | BadFile | DataError:
        uri, mask = storage.path(name), files.masks.get(name)
        caption = captions.try_of(name)
        if isinstance(caption, DataError):
            return caption
        try:
            found = None if known is None or check else _recall(known, uri, mask, max_pixels)
            seen, weights = found or _look_inside(storage, name, mask, max_pixels=max_pixels, check=check)
        except (DataError, StorageError) as error:
            return BadFile(uri, str(error).removeprefix(f"{uri}: "))
        sha256 = seen.sha256
        row = Row(sha256[:16], uri, seen.width, seen.height, caption, sha256, concept, role, repeats)
        return row if weights is None else row._replace(mask=mask, mask_sha256=weights.sha256)

    workers = min(32, 2 * (os.cpu_count() or 1) if storage.is_local else 32, max(1, len(files.images)))
    with ThreadPoolExecutor(workers, thread_name_prefix="index") as pool:
        found = list(pool.map(look, files.images))
    refuse_all([*captions.errors, *(item for item in found if isinstance(item, DataError))])
    rows = [item for item in found if isinstance(item, Row)]
    bad += [item for item in found if isinstance(item, BadFile)]
    bad += [
        BadFile(f"{storage.url}/{name}", f"named in {where}, but not there")
        for name, where in captions.absent
    ]
    bad.sort()
    if not rows:
        raise DataError(_nothing_usable(files))
    rows.sort(key=lambda row: (row.sha256[:16], row.uri[len(storage.url) :]))
    return _assemble(rows, bad, files.skipped)


def log_left_out(index: Index) -> None:
    """Log what is left out of an index, once and for all: bad files as warnings, the rest in one line."""
    for file in index.bad[:LOGGED]:
        log.warning("left out %s: %s", file.uri, file.reason)
    if len(index.bad) > LOGGED:
        log.warning("left out %d more files: `dreamfleet data inspect` lists them", len(index.bad) - LOGGED)
    if index.skipped:
        log.info("passed over %s", summary(index.skipped))


def _look_inside(
    storage: Storage, name: str, mask: str | None, *, max_pixels: int, check: bool
) -> tuple[Seen, Seen | None]:
    """Read a picture, and its mask where it has one. Raises DataError for a bad one of both, and StorageError."""
    uri = storage.path(name)
    data, mask_file = storage.read_bytes(name), read_mask(mask) if mask else None
    header = read_header(data, uri=uri, max_pixels=max_pixels)
    if holds_embedding(data):
        raise DataError(f"{uri}: an embedding that is stored as an image. Move it out of the folder")
    if check:
        check_image(data, uri=uri, max_pixels=max_pixels)
    if mask_file is not None:
        open_mask(mask_file, uri=f"its mask {mask}", max_pixels=max_pixels)
    seen = Seen(hashlib.sha256(data).hexdigest(), header.width, header.height)
    return seen, Seen(hashlib.sha256(mask_file.data).hexdigest()) if mask_file is not None else None


def _recall(known: Known, uri: str, mask: str | None, max_pixels: int) -> tuple[Seen, Seen | None] | None:
    """Return what is known of a picture and its mask; None where one of them must be read."""
    seen, weights = known(uri), known(mask) if mask else None
    if seen is None or (mask and weights is None) or seen.width * seen.height > max_pixels:
        return None
    return seen, weights


def _assemble(rows: Sequence[Row], bad: Sequence[BadFile], skipped: Sequence[Skipped] = ()) -> Index:
    """Number copies in the order given (copies side by side), and sort by id."""
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


def _nothing_usable(files: ImageFolder) -> str:
    place, bad = files.storage.url, files.bad
    over = f"; passed over: {summary(files.skipped)}" if files.skipped else ""
    if bad:
        return (
            f"no usable image in {place}: {len(bad)} found and all bad: {_some(bad)}{over}. Replace or convert them, "
            "or name another folder"
        )
    count = files.others.total()
    held = f"{count} other files" if count else "nothing else" if over else "nothing at all"
    return f"no image in {place}: it holds {held}{over}. Put images (.png, .jpg ...) there, or name another folder"


def _some(bad: Sequence[BadFile], most: int = 3) -> str:
    told = "; ".join(f"{item.uri}: {item.reason}" for item in bad[:most])
    return told + (f"; and {len(bad) - most} more" if len(bad) > most else "")
