"""Folders of pictures to one Arrow table: stable id, size, caption and hash of each; bad files reported."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa

from dreamfleet.datasets.config import Concept, DataConfig
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.images import (
    MAX_PIXELS,
    UNREADABLE_SUFFIXES,
    check_picture,
    read_header,
)
from dreamfleet.datasets.masks import find_masks, open_mask, pictures_among, read_mask, visible
from dreamfleet.datasets.sidecars import CaptionFinder
from dreamfleet.datasets.storage import Storage

__all__ = ["BadFile", "Concept", "DataConfig", "Index", "Row", "build_index"]

log = logging.getLogger(__name__)

VERIFY_LIMIT = 2000  # up to so many pictures are decoded at index time, to find those cut short
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


class BadFile(NamedTuple):
    """A file that looks like a picture and cannot be used."""

    uri: str
    reason: str


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

    def __init__(self, table: pa.Table, *, bad: Sequence[BadFile] = ()) -> None:
        self.table = table
        self.bad = list(bad)

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

    def take(self, numbers: Sequence[int], captions: Sequence[str | None]) -> Index:
        """The pictures in some rows, in this order, with these captions in place of their own."""
        place = SCHEMA.get_field_index("caption")
        taken = self.table.take(pa.array(numbers, pa.int64()))
        return Index(
            taken.set_column(place, SCHEMA.field(place), pa.array(captions, pa.string())), bad=self.bad
        )

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
        return _assemble([row for _, row in rows], [bad for index in indexes for bad in index.bad])


def build_index(
    folder: Storage | str,
    *,
    concept: int = 0,
    role: str = "instance",
    caption_extension: Sequence[str] = (".txt", ".caption"),
    recursive: bool = True,
    max_pixels: int = MAX_PIXELS,
    repeats: int = 1,
    verify: bool | None = None,
    exclude: Callable[[str], bool] | None = None,
    mask_dir: str | None = None,
    known: Known | None = None,
) -> Index:
    """Index the pictures of a folder on disk or in a bucket.

    Each file is read once, by a pool of threads, unless `known(address)` says what is in it. A caption comes from a
    file of the same stem with one of `caption_extension` (the first there is), else from `metadata.jsonl` /
    `metadata.csv` in the folder or one
    above it. With `verify` (None: up to 2000 pictures) every pixel is decoded, so that a picture cut short
    is found now. Bad pictures, and those whose mask is bad, are listed in `.bad` and left out. `exclude(name)`
    leaves out files. Masks are `NAME.mask.png` or `NAME_att.png` beside pictures, or the pictures of the same names in
    `mask_dir`.

    Raises DataError, naming the folder, what is wrong and the way out, when the folder is not there or holds
    no usable picture, and when a caption file is not UTF-8 or a metadata file is broken.
    """
    storage = Storage(folder)
    bad: list[BadFile] = []
    names = _list(storage, recursive, bad)
    if exclude is not None:
        names = [name for name in names if not exclude(name)]
    masks = find_masks(storage, names, mask_dir)
    pictures = pictures_among(names)
    bad += [
        BadFile(
            storage.path(name), f"{os.path.splitext(name)[1]} files cannot be read. Convert it to PNG or JPEG"
        )
        for name in names
        if name.lower().endswith(UNREADABLE_SUFFIXES)
    ]
    check = len(pictures) <= VERIFY_LIMIT if verify is None else verify
    captions = CaptionFinder(storage, names, tuple(caption_extension))

    def look(name: str) -> Row | BadFile:
        uri, mask = storage.path(name), masks.get(name)
        try:
            found = None if known is None or check else _recall(known, uri, mask, max_pixels)
            seen, weights = found or _look_inside(storage, name, mask, max_pixels=max_pixels, check=check)
        except (DataError, StorageError) as error:
            return BadFile(uri, str(error).removeprefix(f"{uri}: "))
        sha256, caption = seen.sha256, captions.of(name)
        row = Row(sha256[:16], uri, seen.width, seen.height, caption, sha256, concept, role, repeats)
        return row if weights is None else row._replace(mask=mask, mask_sha256=weights.sha256)

    workers = min(32, 2 * (os.cpu_count() or 1) if storage.is_local else 32, max(1, len(pictures)))
    with ThreadPoolExecutor(workers, thread_name_prefix="index") as pool:
        found = list(pool.map(look, pictures))
    rows = [item for item in found if isinstance(item, Row)]
    bad += [item for item in found if isinstance(item, BadFile)]
    bad += [
        BadFile(f"{storage.url}/{name}", f"named in {where}, but not there")
        for name, where in captions.absent()
    ]
    bad.sort()
    if not rows:
        raise DataError(_nothing_usable(storage, names, pictures, bad))
    if bad:
        log.warning("%s: %d pictures used, %d left out: %s", storage.url, len(rows), len(bad), _some(bad))
    rows.sort(key=lambda row: (row.sha256[:16], row.uri[len(storage.url) :]))
    return _assemble(rows, bad)


def _look_inside(
    storage: Storage, name: str, mask: str | None, *, max_pixels: int, check: bool
) -> tuple[Seen, Seen | None]:
    """Read a picture, and its mask where it has one. Raises DataError for a bad one of both, and StorageError."""
    uri = storage.path(name)
    data, mask_file = storage.read_bytes(name), read_mask(mask) if mask else None
    header = read_header(data, uri=uri, max_pixels=max_pixels)
    if check:
        check_picture(data, uri=uri, max_pixels=max_pixels)
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


def _assemble(rows: Sequence[Row], bad: Sequence[BadFile]) -> Index:
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
    return Index(pa.Table.from_arrays(arrays, schema=SCHEMA), bad=bad)


def _copy_number(row_id: str) -> int:
    return int(row_id.partition("-")[2] or 0)


def _list(storage: Storage, recursive: bool, bad: list[BadFile]) -> list[str]:
    """Names of the visible files; subfolders that cannot be listed go to `bad`."""
    try:
        if not storage.exists():
            raise DataError(
                f"folder {storage.url} does not exist. Check the path (relative ones start at the recipe)"
            )
        if storage.is_local and not os.path.isdir(storage.url):
            raise DataError(f"{storage.url} is a file: name the folder of pictures it is in")
        names = storage.list(
            "", recursive, on_error=lambda place, error: bad.append(BadFile(place, str(error)))
        )
    except StorageError as error:
        raise DataError(f"pictures: {error}") from error
    return visible(names)


def _nothing_usable(
    storage: Storage, names: Sequence[str], pictures: Sequence[str], bad: Sequence[BadFile]
) -> str:
    if bad:
        return (
            f"no usable picture in {storage.url}: {len(bad)} found and all bad: {_some(bad)}. "
            "Replace or convert them, or name another folder"
        )
    held = f"{len(names)} other files" if names else "nothing at all"
    return (
        f"no picture in {storage.url}: it holds {held}. Put pictures (.png, .jpg, .webp ...) there, "
        "or name another folder"
    )


def _some(bad: Sequence[BadFile], most: int = 3) -> str:
    told = "; ".join(f"{item.uri}: {item.reason}" for item in bad[:most])
    return told + (f"; and {len(bad) - most} more" if len(bad) > most else "")
