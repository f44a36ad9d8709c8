"""Filters of the page: which rows of the table a person asked for, computed on whole columns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dreamfleet.cluster.browse.image_table import ImageTable
from dreamfleet.datasets.errors import UserError

TAGS_SHOWN = 300  # tags that the page lists at once
TAGS_AT_ONCE = 100_000  # captions that are split at the same time
STATES = ("used", "excluded", "edited", "uncaptioned", "masked", "copies", "near")


def select_rows(table: ImageTable, wanted: Mapping[str, Any]) -> np.ndarray:
    """Return the rows that match all filters, in order; duplicates of a group are adjacent if only they are shown.

    Filters: ``text`` in caption or address, ``tag`` (a whole tag), ``bucket`` ("512x768"), ``least`` and ``most``
    (pixels of the shorter side of the file or its crop), ``state`` (one of ``STATES``). Raises UserError for others.
    """
    keep = np.ones(len(table), bool)
    for name, value in wanted.items():
        if value in (None, ""):
            continue
        if name not in _FILTERS:
            raise UserError(f"no such filter: {name!r}")
        keep &= _FILTERS[name](table, value)
    rows = np.flatnonzero(keep)
    if wanted.get("state") in ("copies", "near"):
        groups = table.copies if wanted["state"] == "copies" else table.near
        rows = rows[np.argsort(groups[rows], kind="stable")]
    return rows


def count_tags(table: ImageTable, find: str = "") -> tuple[int, list[tuple[str, int]]]:
    """Return the number of distinct tags, and the most frequent ones that contain ``find`` with their counts."""
    counts: Counter[str] = Counter()
    captions = table.caption_array()
    for start in range(0, len(captions), TAGS_AT_ONCE):
        parts = pc.split_pattern_regex(captions.slice(start, TAGS_AT_ONCE).drop_null(), r"[,\n]")
        found = pc.utf8_trim_whitespace(pc.list_flatten(parts)).value_counts()
        for tag, count in zip(
            found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True
        ):
            counts[tag] += count
    counts.pop("", None)
    matching = [(tag, count) for tag, count in counts.items() if find.casefold() in tag.casefold()]
    return len(counts), sorted(matching, key=lambda item: (-item[1], item[0]))[:TAGS_SHOWN]


def count_buckets(table: ImageTable) -> list[tuple[str, int]]:
    """Return the training sizes in use, such as "512x768", with their number of images that are not excluded."""
    counts = np.bincount(table.buckets[~table.excluded], minlength=len(table.sizes))
    pairs = sorted(zip(table.sizes, counts.tolist(), strict=True))
    return [(f"{width}x{height}", count) for (width, height), count in pairs if count]


def count_states(table: ImageTable) -> dict[str, int]:
    """Return the number of images in each of ``STATES``, and of files that cannot be used (``errors``)."""
    found = {state: int(_state(table, state).sum()) for state in STATES}
    return {**found, "errors": len(table.bad)}


def _text(table: ImageTable, value: Any) -> np.ndarray:
    pattern = str(value)
    in_caption = pc.match_substring(table.caption_array(), pattern, ignore_case=True)
    in_uri = pc.match_substring(table.uris, pattern, ignore_case=True)
    return _as_mask(in_caption) | _as_mask(in_uri)


def _tag(table: ImageTable, value: Any) -> np.ndarray:
    pattern = rf"(^|[,\n])[ \t]*{re.escape(str(value).strip())}[ \t\r]*($|[,\n])"
    return _as_mask(pc.match_substring_regex(table.caption_array(), pattern))


def _bucket(table: ImageTable, value: Any) -> np.ndarray:
    names = [f"{width}x{height}" for width, height in table.sizes]
    if value not in names:
        return np.zeros(len(table), bool)
    return np.asarray(table.buckets == names.index(value))


def _least(table: ImageTable, value: Any) -> np.ndarray:
    return np.asarray(np.minimum(table.widths, table.heights) >= _whole(value))


def _most(table: ImageTable, value: Any) -> np.ndarray:
    return np.asarray(np.minimum(table.widths, table.heights) <= _whole(value))


def _state(table: ImageTable, value: Any) -> np.ndarray:
    if value == "used":
        return ~table.excluded
    if value == "excluded":
        return table.excluded
    if value == "edited":
        mask = np.zeros(len(table), bool)
        mask[list(table.edits)] = True
        return mask
    if value == "uncaptioned":
        return _as_mask(pc.is_null(table.caption_array()))
    if value == "masked":
        return table.masked
    if value in ("copies", "near"):
        return np.asarray((table.copies if value == "copies" else table.near) > 0)
    raise UserError(f"no such state: {value!r}")


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"a number of pixels is expected, not {value!r}")
    return value


def _as_mask(found: pa.Array | pa.ChunkedArray) -> np.ndarray:
    filled = pc.fill_null(found, False)
    return np.asarray(
        filled.to_numpy(zero_copy_only=False) if isinstance(filled, pa.Array) else filled.to_numpy()
    )


_FILTERS = {"text": _text, "tag": _tag, "bucket": _bucket, "least": _least, "most": _most, "state": _state}
