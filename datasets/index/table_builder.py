"""Makes the table of a set from its images, one by one, without keeping them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dreamfleet.datasets.index.facts import Inspected
from dreamfleet.datasets.index.image_index import SCHEMA, number_copies

EXCLUDED = "excluded"  # column: the rule that excludes the image, null if it is used
ROWS_AT_ONCE = 8192  # that are kept as Python objects

#: Columns of a set's table, before those that its source or a command adds.
TABLE_SCHEMA = pa.schema(
    [
        *SCHEMA,
        ("bytes", pa.int64()),  # of the file; null if unknown
        ("format", pa.string()),
        ("orientation", pa.int8()),  # EXIF, 1 to 8
        ("phash", pa.string()),  # 16 hex digits; null if not computed
        ("name", pa.string()),  # relative path in the set
        ("source", pa.string()),  # the source that lists the image
        (EXCLUDED, pa.string()),
    ]
)


class TableBuilder:
    """Collects the images of the source called ``source``; facts that are unknown are null."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._waiting: list[Inspected] = []
        self._tables: list[pa.Table] = []
        self._count = 0
        self._own: dict[str, list[Any]] = {}  # columns of the source, whose types depend on all values

    def add(self, image: Inspected) -> None:
        """Add one image."""
        for name, value in (image.image.columns or {}).items():
            if name not in TABLE_SCHEMA.names:
                column = self._own.setdefault(name, [])
                column.extend([None] * (self._count - len(column)))
                column.append(value)
        self._count += 1
        self._waiting.append(image)
        if len(self._waiting) >= ROWS_AT_ONCE:
            self._flush()

    def finish(self) -> pa.Table:
        """Return the table of all images, sorted by id."""
        self._flush()
        table = pa.concat_tables(self._tables) if self._tables else TABLE_SCHEMA.empty_table()
        for name in list(self._own):
            column = self._own.pop(name)
            column.extend([None] * (self._count - len(column)))
            table = table.append_column(name, _to_array(column))
        self._tables = []
        return number_copies(table)

    def _flush(self) -> None:
        found, self._waiting = self._waiting, []
        number = len(found)
        if not number:
            return
        constants = {"concept": 0, "role": "instance", "repeats": 1, "fraction": 0.0, "source": self._source}
        values: dict[str, list[Any]] = {
            "id": [""] * number,
            "uri": [one.image.uri for one in found],
            "width": [one.info.width for one in found],
            "height": [one.info.height for one in found],
            "caption": [one.image.caption for one in found],
            "sha256": [one.info.sha256 for one in found],
            "mask": [one.image.mask if one.mask_sha256 else None for one in found],
            "mask_sha256": [one.mask_sha256 or None for one in found],
            "bytes": [one.info.bytes or None for one in found],
            "format": [one.info.format or None for one in found],
            "orientation": [one.info.orientation or None for one in found],
            "phash": [one.info.phash or None for one in found],
            "name": [one.image.name or one.image.uri.rpartition("/")[2] for one in found],
            EXCLUDED: [None] * number,
        }
        values |= {name: [value] * number for name, value in constants.items()}
        arrays = [pa.array(values[field.name], field.type) for field in TABLE_SCHEMA]
        self._tables.append(pa.Table.from_arrays(arrays, schema=TABLE_SCHEMA))


def _to_array(values: Sequence[Any]) -> pa.Array:
    """Return values as an Arrow array: of their type, else as text; lists of texts are joined by commas."""
    texts = [
        ", ".join(map(str, value)) if isinstance(value, list | tuple | np.ndarray) else value
        for value in values
    ]
    try:
        return pa.array(texts)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in texts], pa.string())
