"""The index of a run: an Arrow table with id, size, caption and hash of each image, and a list of bad files."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dreamfleet.datasets.index.exclusions import BadFile, Skipped
from dreamfleet.datasets.index.lazy_rows import LazyRows

T = TypeVar("T")

STEM = 16  # hex digits of the hash that an id begins with
HASHED_AT_ONCE = 10_000  # rows
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
        ("fraction", pa.float64()),  # of a further use per epoch, beyond the repeats; in [0, 1)
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
    fraction: float = 0.0


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
        self.excluded: list[
            Skipped
        ] = []  # images that filters leave out: their set, the filter, their number

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

    def numbers(self, name: str) -> np.ndarray:
        """Return a column of numbers as an array."""
        return np.asarray(self.table.column(name).to_numpy())

    def lazily(self, columns: Sequence[str], make: Callable[..., T]) -> LazyRows[T]:
        """Return for every image what ``make`` returns for its values of some columns, made when it is used."""
        return LazyRows(self.table, columns, make)

    def sizes(self) -> Sequence[tuple[int, int]]:
        """Return the width and height of every image in pixels."""
        return self.lazily(("width", "height"), lambda width, height: (width, height))

    def uses(self) -> np.ndarray:
        """Return the number of uses of every image per epoch, which may have a fraction."""
        return self.numbers("repeats") + self.numbers("fraction")

    def with_uses(self, uses: float) -> Index:
        """Return this index with a number of uses of each image per epoch, which may have a fraction."""
        whole = int(uses + 1e-9)
        table = self.table
        for name, value in (("repeats", whole), ("fraction", max(0.0, uses - whole))):
            place = SCHEMA.get_field_index(name)
            column = pa.array(np.full(len(self), value), SCHEMA.field(name).type)
            table = table.set_column(place, SCHEMA.field(name), column)
        return self.with_table(table)

    def with_table(self, table: pa.Table) -> Index:
        """Return an index of the rows of another table, with the same files beside them."""
        changed = Index(table, bad=self.bad, skipped=self.skipped)
        changed.others, changed.shared, changed.excluded = self.others, self.shared, self.excluded
        return changed

    def take(self, numbers: Sequence[int], captions: Sequence[str | None]) -> Index:
        """Return an index of the rows ``numbers``, in this order, with their captions replaced by ``captions``."""
        place = SCHEMA.get_field_index("caption")
        taken = self.table.take(pa.array(numbers, pa.int64()))
        captioned = taken.set_column(place, SCHEMA.field(place), pa.array(captions, pa.string()))
        return self.with_table(captioned)

    @property
    def content_hash(self) -> str:
        """SHA-256 (hex) of ids, contents, captions, concepts, roles, repeats and masks, but not of locations."""
        digest = hashlib.sha256()
        batches = self.table.to_batches(max_chunksize=HASHED_AT_ONCE)
        for row in (row for batch in batches for row in Index(pa.Table.from_batches([batch])).rows()):
            seen = [row.id, row.sha256, row.caption, row.concept, row.role, row.repeats]
            seen += [row.mask_sha256] if row.mask_sha256 else []
            seen += [str(row.fraction)] if row.fraction else []
            digest.update(json.dumps(seen, ensure_ascii=True).encode() + b"\n")
        return digest.hexdigest()

    @staticmethod
    def concat(indexes: Sequence[Index]) -> Index:
        """Return one index of the rows of several; copies of an image in different indexes also get "-k" ids."""
        tables = [
            index.table.append_column("__place", pa.array(np.full(len(index), place)))
            for place, index in enumerate(indexes)
        ]
        table = pa.concat_tables(tables)
        copies = pa.array([_copy_number(row_id) for row_id in table.column("id").to_pylist()], pa.int64())
        table = table.append_column("__copy", copies)
        table = _sorted(table, ["__stem", "__place", "__copy"])
        bad = [bad for index in indexes for bad in index.bad]
        made = Index(
            number_copies(table.select(SCHEMA.names)),
            bad=bad,
            skipped=[one for index in indexes for one in index.skipped],
        )
        for index in indexes:
            made.others += index.others
            made.shared |= index.shared
            made.excluded += index.excluded
        return made


def number_copies(table: pa.Table) -> pa.Table:
    """Return an index table sorted by id, with the ids of its rows; copies are numbered in the order of the rows."""
    table = _sorted(table, ["__stem"])
    stems = (
        pc.utf8_slice_codeunits(table.column("sha256"), 0, STEM).to_numpy(zero_copy_only=False).astype(str)
    )
    starts = np.flatnonzero(np.r_[True, stems[1:] != stems[:-1]]) if len(stems) else np.array([], int)
    copies = np.arange(len(stems)) - np.repeat(starts, np.diff(np.r_[starts, len(stems)]))
    ids = stems.astype(object)
    for row in np.flatnonzero(copies).tolist():
        ids[row] = f"{stems[row]}-{copies[row]}"
    place = table.schema.get_field_index("id")
    table = table.set_column(place, "id", pa.array(ids, pa.string()))
    return table.take(pc.sort_indices(table.column("id")))


def _sorted(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Return a table sorted by ``__stem``, the first digits of the hashes, and other columns; ties keep their order."""
    stem = pc.utf8_slice_codeunits(table.column("sha256"), 0, STEM)
    keyed = table.append_column("__stem", stem).append_column("__row", pa.array(np.arange(table.num_rows)))
    order = pc.sort_indices(keyed, [(key, "ascending") for key in (*keys, "__row")])
    return table.take(order)


def _copy_number(row_id: str) -> int:
    return int(row_id.partition("-")[2] or 0)
