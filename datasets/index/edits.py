"""Edits of an image set, stored beside it: excluded images, captions, crops, focus points and masks.

The set itself is never changed. ``dreamfleet data browse`` writes the table, and indexing a recipe's set applies it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dreamfleet.datasets.buckets import training_sizes
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index.file_pairing import composed
from dreamfleet.datasets.index.sources import FOLDER, find_source
from dreamfleet.datasets.storage.object_store import is_address
from dreamfleet.datasets.storage.storage import Storage

EDITS_FOLDER = ".dreamfleet"  # hidden, so it is never read as a folder of images
EDITS_FILE = "edits.parquet"
MASKS = "masks"  # its files have no image extension, for the same reason
FORMAT = b"dreamfleet edits 1"

Box = tuple[float, float, float, float]  # left, top, right, bottom as fractions of the width and height
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)

_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("excluded", pa.bool_()),
        ("caption", pa.string()),
        ("crop", pa.list_(pa.float64())),
        ("focus", pa.list_(pa.float64())),
        ("mask", pa.string()),
    ],
    metadata={"format": FORMAT},
)


class Edit(NamedTuple):
    """The edits of one image. A field that is None leaves the image as its source has it.

    ``sha256``, ``width`` and ``height`` (pixels) are those of the file when it was edited. ``caption`` "" removes the
    caption. ``crop`` is the part of the image that is used; ``focus`` a point (x, y) of it, as fractions of the whole
    image, around which the training size is cut. ``mask`` is the name of a file in ``masks/``, "" removes the mask.
    """

    sha256: str = ""
    width: int = 0
    height: int = 0
    excluded: bool = False
    caption: str | None = None
    crop: Box | None = None
    focus: tuple[float, float] | None = None
    mask: str | None = None

    @property
    def changes(self) -> bool:
        """Whether anything differs from what the source has."""
        return self.excluded or any(
            value is not None for value in (self.caption, self.crop, self.focus, self.mask)
        )

    def box(self, data: DataConfig) -> Box | None:
        """Return the part of the image that is used at the training sizes of a ``data:`` section; None: all of it.

        Around a focus point it is the largest part of the crop with the shape of the training size, moved as little as
        the edges require.
        """
        if self.focus is None or not self.width or not self.height:
            return self.crop
        left, top, right, bottom = self.crop or WHOLE
        width, height = (right - left) * self.width, (bottom - top) * self.height
        (target,) = training_sizes([(max(1, round(width)), max(1, round(height)))], data)
        scale = min(width / target[0], height / target[1])
        wide, high = target[0] * scale / self.width, target[1] * scale / self.height
        x = min(max(self.focus[0] - wide / 2, left), max(left, right - wide))
        y = min(max(self.focus[1] - high / 2, top), max(top, bottom - high))
        return x, y, min(right, x + wide), min(bottom, y + high)


class EditTable:
    """The edits of one set: :attr:`edits` by the image's name in the set; :meth:`save` writes them.

    Raises DataError if the stored table is broken or of another format.
    """

    def __init__(self, url: str):
        self.url, self.folder = url, edits_folder(url)
        self.edits: dict[str, Edit] = {}
        self._version = ""
        if self.folder is not None and self.folder.exists(EDITS_FILE):
            content, self._version = self.folder.read_version(EDITS_FILE)
            self.edits = _decode(content, self.folder.path(EDITS_FILE))

    def of(self, uri: str) -> Edit | None:
        """Return the edits of the image at a URI of the set; None without any."""
        return self.edits.get(edit_name(uri, self.url)) if self.edits else None

    def save(self, changes: Mapping[str, Edit]) -> None:
        """Apply new edits, by name, and write the table; an edit that changes nothing is removed.

        Raises DataError if the set has no folder for edits, StorageError if the table cannot be written or another
        program wrote it in the meantime.
        """
        if self.folder is None:
            raise DataError(
                f"{self.url}: edits are stored beside a set, and this address has no folder. Copy its table to a "
                "folder or a bucket, and name that"
            )
        merged = {name: edit for name, edit in {**self.edits, **changes}.items() if edit.changes}
        content = _encode(merged)
        if not self.folder.write_if(EDITS_FILE, content, version=self._version):
            raise StorageError(
                f"{self.folder.path(EDITS_FILE)} was changed by another program, and does not contain this edit. "
                "Restart this command: it continues from the file"
            )
        self.edits, self._version = merged, self.folder.read_version(EDITS_FILE)[1]

    def add_mask(self, content: bytes) -> str:
        """Store a mask (an image file, white has full weight) and return its name for :attr:`Edit.mask`."""
        name = f"{hashlib.sha256(content).hexdigest()[:32]}.mask"
        if self.folder is None:
            self.save({})  # raises the error
        elif not self.folder.exists(f"{MASKS}/{name}"):
            self.folder.write_bytes(f"{MASKS}/{name}", content)
        return name

    def mask_uri(self, edit: Edit) -> str | None:
        """Return the URI of an edit's own mask; None without one."""
        return self.folder.path(MASKS, edit.mask) if self.folder is not None and edit.mask else None


def edits_folder(url: str) -> Storage | None:
    """Return the folder of a set's edits: in an image folder, else beside the set's files; None if there is none."""
    if not is_address(url):
        return None
    place = Storage(url)
    if find_source(url).name == FOLDER or (place.is_local and os.path.isdir(place.url)):
        return place.child(EDITS_FOLDER)
    parent, _, name = place.url.rpartition("/")
    return Storage(parent or "/").child(EDITS_FOLDER, name)


def edit_name(uri: str, url: str) -> str:
    """Return the name of the image at ``uri`` in the set at ``url``: its path there, in composed Unicode form."""
    base = url.rstrip("/")
    for place in (f"{base}/", base, f"{base.rpartition('/')[0]}/"):
        if place in uri:
            return composed(uri.replace(place, "", 1))
    return composed(uri)


def _encode(edits: Mapping[str, Edit]) -> bytes:
    columns: dict[str, list[Any]] = {"name": list(edits)}
    columns |= {field: [getattr(edit, field) for edit in edits.values()] for field in Edit._fields}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=_SCHEMA), sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def _decode(content: bytes, address: str) -> dict[str, Edit]:
    try:
        table = pq.read_table(pa.BufferReader(content))
        if (table.schema.metadata or {}).get(b"format") != FORMAT:
            raise DataError(
                f"{address}: not a table of edits of this version. Move it away, or update dreamfleet"
            )
        columns = [table.column(name).to_pylist() for name in _SCHEMA.names]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(
            f"{address} is broken ({error}). Restore it, or remove it to drop all edits"
        ) from error
    return dict(_rows(columns, address))


def _rows(columns: list[list[Any]], address: str) -> Iterable[tuple[str, Edit]]:
    for name, sha256, width, height, excluded, caption, crop, focus, mask in zip(*columns, strict=True):
        edit = Edit(sha256, width, height, bool(excluded), caption, check_box(crop), check_point(focus), mask)
        if mask and ("/" in mask or mask.startswith(".")):
            raise DataError(f"{address}: the mask of {name} is not a file name ({mask!r}). Remove the table")
        yield name, edit


def check_box(values: Any) -> Box | None:
    """Return a crop as a box within the image; None stays None. Raises DataError for other values."""
    if values is None:
        return None
    left, top, right, bottom = _fractions(values, 4, "crop")
    if right - left < 1e-4 or bottom - top < 1e-4:
        raise DataError(f"a crop of {values} is empty: left must be below right, and top below bottom")
    return left, top, right, bottom


def check_point(values: Any) -> tuple[float, float] | None:
    """Return a focus point within the image; None stays None. Raises DataError for other values."""
    if values is None:
        return None
    x, y = _fractions(values, 2, "focus")
    return x, y


def _fractions(values: Any, count: int, what: str) -> list[float]:
    found = [float(value) for value in values]
    if len(found) != count or not all(0 <= value <= 1 for value in found):
        raise DataError(f"a {what} has {count} fractions from 0 to 1 of the image's sides, not {values}")
    return [round(value, 6) for value in found]
