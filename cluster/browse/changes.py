"""Turns a person's request into edits of images, and keeps the history for undo and redo."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from dreamfleet.cluster.browse.image_table import ImageTable
from dreamfleet.datasets.captions import split_tags
from dreamfleet.datasets.errors import DataError, UserError
from dreamfleet.datasets.images.masks import Mask, open_mask
from dreamfleet.datasets.index.edits import Edit, check_box, check_point
from dreamfleet.datasets.tools import tags

MOST_UNDONE = 200  # edits that can be undone
MASK_PIXELS = 4096 * 4096


class History:
    """Applies edits to a table and undoes them; each entry is (row -> edit before, row -> edit after)."""

    def __init__(self, table: ImageTable):
        self.table = table
        self.done: list[tuple[dict[int, Edit], dict[int, Edit]]] = []
        self.undone: list[tuple[dict[int, Edit], dict[int, Edit]]] = []

    def apply(self, changes: Mapping[int, Edit]) -> list[int]:
        """Store new edits; return the rows that differ from before."""
        before = {row: self.table.edit_of(row) for row in changes}
        after = {row: edit for row, edit in changes.items() if edit != before[row]}
        if after:
            self.table.set_edits(after)
            self.done = [*self.done, ({row: before[row] for row in after}, after)][-MOST_UNDONE:]
            self.undone = []
        return list(after)

    def undo(self) -> list[int]:
        """Undo the last edit; return its rows."""
        return self._move(self.done, self.undone, 0)

    def redo(self) -> list[int]:
        """Repeat the edit that was undone last; return its rows."""
        return self._move(self.undone, self.done, 1)

    def _move(self, source: list[Any], target: list[Any], side: int) -> list[int]:
        if not source:
            return []
        self.table.set_edits(source[-1][side])
        target.append(source.pop())
        return list(target[-1][side])


def make_changes(table: ImageTable, rows: Sequence[int], wanted: Mapping[str, Any]) -> dict[int, Edit]:
    """Return the edits that a request makes to images, by row.

    ``wanted`` has one key: ``caption`` (text), ``add``, ``first`` or ``remove`` (tags, separated by commas),
    ``replace`` ([old, new]), ``excluded`` (bool), ``crop`` (box or None), ``focus`` (point or None), ``mask`` (a PNG in
    base64, "" to remove the mask, None for the one of the set) or ``reset``. Raises UserError for others.
    """
    ((kind, value),) = wanted.items()
    if kind not in _KINDS:
        raise UserError(f"no such edit: {kind!r}")
    make = _KINDS[kind](table, value)
    return {row: make(row, table.edit_of(row)) for row in rows}


Make = Callable[[int, Edit], Edit]


def _caption(table: ImageTable, value: Any) -> Make:
    if not isinstance(value, str):
        raise UserError(f"a caption is a text, not {value!r}")
    text = "\n".join(line.strip() for line in value.splitlines() if line.strip())
    return lambda row, edit: _with_caption(table, row, edit, text)


def _retag(table: ImageTable, change: tags.Edit) -> Make:
    return lambda row, edit: _with_caption(
        table, row, edit, tags.edit_caption(table.captions[row] or "", change)
    )


def _with_caption(table: ImageTable, row: int, edit: Edit, text: str) -> Edit:
    """Return the edit with a caption; one equal to the source's is no edit."""
    return edit._replace(caption=None if text == (table.original_caption(row) or "") else text)


def _add(table: ImageTable, value: Any) -> Make:
    return _retag(table, tags.Edit(add=_tags(value)))


def _first(table: ImageTable, value: Any) -> Make:
    return _retag(table, tags.Edit(prepend=_tags(value)))


def _remove(table: ImageTable, value: Any) -> Make:
    return _retag(table, tags.Edit(remove=_tags(value)))


def _replace(table: ImageTable, value: Any) -> Make:
    old, new = value
    if not _tags(old):
        raise UserError("a tag to replace is expected")
    return _retag(table, tags.Edit(replace=((str(old).strip(), str(new).strip()),)))


def _tags(value: Any) -> tuple[str, ...]:
    if not isinstance(value, str) or not split_tags(value):
        raise UserError("at least one tag is expected")
    return tuple(split_tags(value))


def _excluded(table: ImageTable, value: Any) -> Make:
    if not isinstance(value, bool):
        raise UserError(f"true or false is expected, not {value!r}")
    return lambda row, edit: edit._replace(excluded=value)


def _crop(table: ImageTable, value: Any) -> Make:
    box = check_box(value)
    return lambda row, edit: edit._replace(crop=box)


def _focus(table: ImageTable, value: Any) -> Make:
    point = check_point(value)
    return lambda row, edit: edit._replace(focus=point)


def _mask(table: ImageTable, value: Any) -> Make:
    if value in (None, ""):
        return lambda row, edit: edit._replace(mask=value)
    content = _grey_png(value)

    def store(row: int, edit: Edit) -> Edit:
        return edit._replace(mask=table.edit_tables[table.concepts[row]].add_mask(content))

    return store


def _reset(table: ImageTable, value: Any) -> Make:
    return lambda row, edit: Edit(edit.sha256, edit.width, edit.height)


def _grey_png(value: Any) -> bytes:
    """Return a painted mask as a grey PNG file. Raises DataError if it is not an image."""
    try:
        content = base64.b64decode(str(value).rpartition(",")[2], validate=True)
    except binascii.Error as error:
        raise DataError("the mask is not an image in base64") from error
    mask = open_mask(Mask(content), uri="the mask", max_pixels=MASK_PIXELS)
    stream = io.BytesIO()
    Image.Image.save(mask, stream, "PNG", optimize=True)
    return stream.getvalue()


_KINDS: dict[str, Callable[[ImageTable, Any], Make]] = {
    "caption": _caption,
    "add": _add,
    "first": _first,
    "remove": _remove,
    "replace": _replace,
    "excluded": _excluded,
    "crop": _crop,
    "focus": _focus,
    "mask": _mask,
    "reset": _reset,
}
