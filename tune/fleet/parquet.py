"""Writes fleet.parquet: one row per subject, in row groups, so that a large fleet is never in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.tune.fleet.rows import SubjectImages, SubjectRow

if TYPE_CHECKING:
    import pyarrow as pa

TABLE = "fleet.parquet"
GROUP = 2000  # rows in one row group
# Column -> its type, and the value of a row.
FIELDS: dict[str, tuple[str, Any]] = {
    "name": ("string", lambda row: _text(row.name)),
    "row": ("int64", lambda row: row.row),
    "status": ("string", lambda row: row.status),
    "reason": ("string", lambda row: _text(row.reason)),
    "steps": ("int64", lambda row: row.steps),
    "seconds": ("float64", lambda row: row.seconds),
    "artifacts": ("strings", lambda row: [_text(path) for path in row.artifacts]),
    "run_folder": ("string", lambda row: _text(row.run_folder)),
    "report": ("string", lambda row: _text(row.report)),
    "base_image": ("string", lambda row: _text(_images(row).base)),
    "tuned_image": ("string", lambda row: _text(_images(row).tuned)),
    "real_image": ("string", lambda row: _text(_images(row).real)),
    "thumbnail": ("string", lambda row: _text(_images(row).thumbnail)),
    "preview_prompt": ("string", lambda row: _text(_images(row).prompt)),
    "preview_seed": ("int64", lambda row: _images(row).seed),
    "prompt": ("string", lambda row: _text(row.prompt)),
    "priority": ("float64", lambda row: row.priority),
}


@dataclass
class _Columns:
    """The columns beyond :data:`FIELDS`: scores, and recipe keys with the Python types of their values."""

    scores: dict[str, None] = field(default_factory=dict)
    values: dict[str, set[type]] = field(default_factory=dict)

    def read(self, rows: Sequence[SubjectRow]) -> None:
        for row in rows:
            self.scores.update(dict.fromkeys(row.scores))
            for key, value in row.values.items():
                if value is not None:
                    self.values.setdefault(key, set()).add(type(value))


def write_fleet_table(folder: Storage, rows: Sequence[SubjectRow]) -> None:
    """Write ``fleet.parquet`` into the folder of a fleet, atomically: the fields, the scores, and the recipe keys.

    Only slices of ``rows`` are read, twice each. A key whose values have several types is written as JSON text.
    """
    import pyarrow.parquet

    columns = _Columns()
    for group in _groups(rows):
        columns.read(group)
    schema = _schema(columns)
    with (
        folder.staging(TABLE) as path,
        pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer,
    ):
        for group in _groups(rows):
            writer.write_table(_table(group, columns, schema))


def _groups(rows: Sequence[SubjectRow]) -> Iterator[Sequence[SubjectRow]]:
    for start in range(0, len(rows), GROUP):
        yield rows[start : start + GROUP]


def _schema(columns: _Columns) -> pa.Schema:
    import pyarrow as pa

    types = {
        "string": pa.string(),
        "strings": pa.list_(pa.string()),
        "int64": pa.int64(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
    }
    fields = [(name, types[kind]) for name, (kind, _) in FIELDS.items()]
    fields += [(_score_column(name), pa.float64()) for name in columns.scores]
    fields += [(key, types[_kind(found)]) for key, found in columns.values.items()]
    return pa.schema(fields)


def _table(rows: Sequence[SubjectRow], columns: _Columns, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    content: dict[str, list[Any]] = {name: [read(row) for row in rows] for name, (_, read) in FIELDS.items()}
    content |= {_score_column(name): [row.scores.get(name) for row in rows] for name in columns.scores}
    for key, found in columns.values.items():
        values = [row.values.get(key) for row in rows]
        if _kind(found) == "string" and found != {str}:
            values = [None if value is None else json_text(value) for value in values]
        content[key] = [_text(value) if isinstance(value, str) else value for value in values]
    return pa.table(content, schema)


def _score_column(name: str) -> str:
    # A metric may have any name. Recipe keys contain a dot and cannot equal a field.
    return f"score_{name}" if name in FIELDS else name


def _kind(found: set[type]) -> str:
    if found == {bool}:
        return "bool"
    if found == {int}:
        return "int64"
    return "float64" if found <= {int, float} else "string"


def _images(row: SubjectRow) -> SubjectImages:
    return row.images or SubjectImages()


def _text(text: str | None) -> str | None:
    """Return text that can be encoded: bytes of a file name that are not UTF-8 are escaped."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode("utf-8")
