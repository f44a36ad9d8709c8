"""Finds the column of an Arrow schema with image files: binary, or Hugging Face's struct of bytes and path."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyarrow as pa

from dreamfleet.datasets.errors import DataError

PREFERRED = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "data", "content")
MOST_FACTS = 64  # further columns that are kept for conditions


class ImageColumn(NamedTuple):
    """The column of image files: its name, and whether it is Hugging Face's struct of bytes and path."""

    name: str
    is_struct: bool

    def bytes_of(self, value: Any) -> bytes | None:
        """Return the image file in a value of the column; None if it is null."""
        return value.get("bytes") if self.is_struct and value is not None else value

    def path_of(self, value: Any) -> str:
        """Return the path in a value of the column; "" without one."""
        return str((value or {}).get("path") or "") if self.is_struct else ""

    def file_column(self, column: pa.ChunkedArray | pa.Array) -> pa.Array:
        """Return the image files of a column as one binary array."""
        whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        return whole.field("bytes") if self.is_struct else whole


def find_image_column(schema: pa.Schema, where: str) -> ImageColumn | None:
    """Return the column with image files; None if there is none. Raises DataError if several could be it."""
    found = {
        field.name: _is_struct(field.type)
        for field in schema
        if _is_binary(field.type) or _is_struct(field.type)
    }
    by_name = {name.lower(): name for name in found}
    chosen = next((by_name[name] for name in PREFERRED if name in by_name), None)
    if chosen is None and len(found) > 1:
        raise DataError(
            f"{where}: the columns {', '.join(found)} all contain bytes. Call the one with the images {PREFERRED[0]!r}"
        )
    chosen = chosen or next(iter(found), None)
    return ImageColumn(chosen, found[chosen]) if chosen is not None else None


def fact_columns(schema: pa.Schema) -> list[str]:
    """Return the columns with texts, numbers, booleans, and lists of texts, which are read besides the images."""
    return [field.name for field in schema if _is_simple(field.type)][:MOST_FACTS]


def describe_schema(schema: pa.Schema) -> str:
    """Return the names and types of columns, for messages."""
    return ", ".join(f"{field.name} ({str(field.type)[:60]})" for field in schema) or "none"


def explain_missing(schema: pa.Schema, where: str) -> DataError:
    """Return the error of a table without images."""
    return DataError(
        f"{where}: no column with images. Their bytes are expected in a binary column, or a struct of bytes and path, "
        f"called {PREFERRED[0]!r}, or their addresses in a text column called 'url'; its columns: "
        f"{describe_schema(schema)}"
    )


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_struct(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and any(
        field.name == "bytes" and _is_binary(field.type)
        for field in (kind.field(n) for n in range(kind.num_fields))
    )


def _is_simple(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type)
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_boolean,
    )
    return any(test(kind) for test in tests)
