"""The images of a recipe's sets as columns, with their edits applied: what the page filters, pages and edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dreamfleet.datasets.buckets import Size, training_sizes
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.images.crop_file import pixel_box
from dreamfleet.datasets.index.duplicates import first_of_near
from dreamfleet.datasets.index.edits import Edit, EditTable, edit_name
from dreamfleet.datasets.index.exclusions import BadFile
from dreamfleet.datasets.index.set_store import open_sets

COLUMNS = ("uri", "width", "height", "caption", "sha256", "concept", "mask", "mask_sha256", "phash")


class ImageTable:
    """N images, sorted by address; row numbers identify them while the page is open.

    ``table`` has the columns ``COLUMNS`` as the sources list them; ``edit_tables[c]`` are the edits of concept c.
    """

    def __init__(
        self,
        table: pa.Table,
        *,
        data: DataConfig,
        urls: Sequence[str],
        edit_tables: Sequence[EditTable],
        bad: Sequence[BadFile] = (),
    ):
        self.data, self.urls, self.edit_tables, self.bad = data, list(urls), list(edit_tables), list(bad)
        table = table.combine_chunks()
        self.table = table.take(pc.sort_indices(table, sort_keys=[("uri", "ascending")])).combine_chunks()
        self.uris = self.table.column("uri")
        self.sha256 = self.table.column("sha256")
        self.concepts = self._numbers("concept")
        self.widths, self.heights = self._numbers("width"), self._numbers("height")
        self.captions = np.array(self.table.column("caption").to_pylist(), dtype=object)
        self.masked = np.asarray(pc.is_valid(self.table.column("mask")))
        self.excluded = np.zeros(len(self), bool)
        self.edits: dict[int, Edit] = {}
        self.buckets, self.sizes = self._bucket_all()
        self._arrow_captions: pa.Array | None = None
        if any(one.edits for one in self.edit_tables):
            self._load_edits()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def uri(self, row: int) -> str:
        """Return the address of an image."""
        return str(self.uris[row].as_py())

    def name(self, row: int) -> str:
        """Return the name of an image in its set."""
        return edit_name(self.uri(row), self.urls[self.concepts[row]])

    def label(self, row: int) -> str:
        """Return an image's name for people: of one inside a file, its name or number there, after the file's name."""
        name = self.name(row)
        if "://" not in name:
            return name
        file, *places = name.partition("://")[2].split("#")
        place = places[-1] if places else ""
        inside = f"row {place}" if place.isdigit() else place
        return ": ".join(part for part in (file, inside) if part) or name

    def mask(self, row: int) -> str | None:
        """Return the address of an image's mask, with its edit; None without one."""
        edit = self.edits.get(row)
        if edit is not None and edit.mask is not None:
            return self.edit_tables[self.concepts[row]].mask_uri(edit)
        found: str | None = self.table.column("mask")[row].as_py()
        return found

    def caption_array(self) -> pa.Array:
        """Return all captions, with edits, as an Arrow array; it is kept until a caption changes."""
        if self._arrow_captions is None:
            self._arrow_captions = pa.array(self.captions, pa.large_string(), from_pandas=True)
        return self._arrow_captions

    def size(self, row: int) -> Size:
        """Return the width and height in pixels at which an image is trained."""
        return self.sizes[self.buckets[row]]

    @cached_property
    def copies(self) -> np.ndarray:
        """The group number of each image among identical files, from 1 on; 0 for images without copies."""
        codes = self.sha256.combine_chunks().dictionary_encode().indices.to_numpy()
        return _number_groups(codes)

    @cached_property
    def near(self) -> np.ndarray:
        """The group number of each image among near duplicates and copies, from 1 on; 0 for the others.

        Groups are those of `data.duplicates: near`. Without perceptual hashes there are none.
        """
        if self.table.column("phash").null_count == len(self):
            return np.zeros(len(self), np.int64)
        found = first_of_near(self.table, self.data.near_distance)
        rows = {uri: row for row, uri in enumerate(self.uris.to_pylist())}
        leaders = np.array(
            [row if kept is True else rows[str(kept).removeprefix("of ")] for row, kept in enumerate(found)]
        )
        return _number_groups(leaders)

    def set_edits(self, changes: Mapping[int, Edit]) -> None:
        """Apply edits by row and store them. Raises DataError or StorageError, and then changes nothing."""
        by_set: dict[int, dict[str, Edit]] = {}
        for row, edit in changes.items():
            by_set.setdefault(int(self.concepts[row]), {})[self.name(row)] = edit
        for number, edits in by_set.items():
            self.edit_tables[number].save(edits)
        for row, edit in changes.items():
            self._show(row, edit)

    def edit_of(self, row: int) -> Edit:
        """Return the edits of an image; without any, one that only describes its file."""
        found = self.edits.get(row)
        return found or Edit(str(self.sha256[row].as_py()), int(self.widths[row]), int(self.heights[row]))

    def original_caption(self, row: int) -> str | None:
        """Return the caption that the source has for an image."""
        found: str | None = self.table.column("caption")[row].as_py()
        return found

    def original_size(self, row: int) -> Size:
        """Return the width and height of an image file in pixels."""
        return int(self.table.column("width")[row].as_py()), int(self.table.column("height")[row].as_py())

    def _load_edits(self) -> None:
        for row in range(len(self)):
            edits = self.edit_tables[self.concepts[row]].edits
            if edits and (edit := edits.get(self.name(row))):
                self._show(row, edit)

    def _show(self, row: int, edit: Edit) -> None:
        """Update the columns of an image to its edits."""
        if edit.changes:
            self.edits[row] = edit
        else:
            self.edits.pop(row, None)
        caption = self.original_caption(row) if edit.caption is None else edit.caption or None
        if caption != self.captions[row]:
            self.captions[row], self._arrow_captions = caption, None
        self.excluded[row] = edit.excluded
        self.masked[row] = self.mask(row) is not None
        width, height = self.original_size(row)
        if box := edit.box(self.data):
            left, top, right, bottom = pixel_box(box, (width, height))
            width, height = right - left, bottom - top
        self.widths[row], self.heights[row] = width, height
        (size,) = training_sizes([(width, height)], self.data)
        if size not in self.sizes:
            self.sizes.append(size)
        self.buckets[row] = self.sizes.index(size)

    def _numbers(self, name: str) -> np.ndarray:
        return np.array(self.table.column(name).to_numpy(), dtype=np.int64)

    def _bucket_all(self) -> tuple[np.ndarray, list[Size]]:
        """Return the number of each image's bucket, and the training size of each bucket."""
        pairs, codes = np.unique(np.stack([self.widths, self.heights], axis=1), axis=0, return_inverse=True)
        of_pairs = training_sizes([(int(width), int(height)) for width, height in pairs], self.data)
        sizes = sorted(set(of_pairs))
        numbers = np.array([sizes.index(size) for size in of_pairs], np.int64)
        return numbers[codes.reshape(-1)], sizes


def _number_groups(codes: np.ndarray) -> np.ndarray:
    """Return the number of each element's group, from 1 on, where equal codes are a group; 0 for single ones."""
    groups = np.bincount(codes) > 1
    numbers = np.where(groups, np.cumsum(groups), 0)
    return np.asarray(numbers[codes], np.int64)


def load_table(
    data: DataConfig, *, excluded: Mapping[str, str] = MappingProxyType({}), near: bool = False
) -> ImageTable:
    """Index the sets of a ``data:`` section without their edits, and load the edits. Raises DataError.

    ``near``: compute the perceptual hashes that near duplicates need.
    """
    unedited = data.model_copy(update={"use_edits": False})
    opened = open_sets(unedited, excluded=excluded, phash=near, verify=False)
    tables, bad = [], []
    for number, one in enumerate(opened):
        table = one.table.select(COLUMNS)
        concept = pa.repeat(pa.scalar(number, pa.int32()), table.num_rows)
        tables.append(table.set_column(COLUMNS.index("concept"), "concept", concept))
        bad += [BadFile(row["uri"], row["reason"]) for row in one.errors.to_pylist()]
        bad += [
            BadFile(row["uri"], f"left out by a filter: {row['rule']}") for row in one.excluded.to_pylist()
        ]
    if not sum(table.num_rows for table in tables):
        raise DataError(
            f"{opened[0].url}: no image can be shown: {len(bad)} cannot be used or are left out by filters"
            + (f", such as {bad[0].uri}: {bad[0].reason}" if bad else "")
            + ". `dreamfleet data inspect` lists them"
        )
    urls = [one.concept.instance_data_dir for one in opened]
    return ImageTable(
        pa.concat_tables(tables),
        data=data,
        urls=urls,
        edit_tables=[EditTable(url) for url in urls],
        bad=bad,
    )


def require_rows(table: ImageTable, rows: Sequence[int]) -> list[int]:
    """Return row numbers of a table. Raises DataError for other values."""
    found = [row for row in rows if type(row) is int and 0 <= row < len(table)]
    if len(found) != len(rows):
        raise DataError("no image has such a number. Reload the page")
    return found
