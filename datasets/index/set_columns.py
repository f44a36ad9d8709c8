"""Joins further columns, such as scores, to the table of a set, by the hash of the image file."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.edited_source import original_uri

KEY, URL = "sha256", "url"


def join_columns(table: pa.Table, others: Sequence[pa.Table]) -> pa.Table:
    """Return a table with the columns of others: null without a row, the first of several rows.

    Rows belong together by the hash of the file; those of a cropped image by the address of the whole one, if the other
    table has addresses. Columns that the table has already are not replaced. Raises DataError if a table has no column
    ``sha256``.
    """
    for other in others:
        if KEY not in other.column_names:
            raise DataError(f"a table of columns lacks {KEY!r} (it has {', '.join(other.column_names)})")
        places = pc.index_in(table.column(KEY), value_set=other.column(KEY).combine_chunks())
        if URL in other.column_names and "uri" in table.column_names:
            wholes = pa.array(_wholes(table.column("uri")), pa.string())
            places = pc.coalesce(places, pc.index_in(wholes, value_set=other.column(URL).combine_chunks()))
        for name in other.column_names:
            if name not in table.column_names and name != URL:
                table = table.append_column(name, other.column(name).take(places))
    return table


def _wholes(uris: pa.ChunkedArray) -> list[str | None]:
    """Return the address of the whole image for each cropped one, else None."""
    return [whole if (whole := original_uri(uri)) != uri else None for uri in uris.to_pylist()]
