"""Joins further columns, such as scores, to the table of a set, by the hash of the image file."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from dreamfleet.datasets.errors import DataError

KEY = "sha256"


def join_columns(table: pa.Table, others: Sequence[pa.Table]) -> pa.Table:
    """Return a table with the columns of others: null without a row, the first of several rows.

    Columns that the table has already are not replaced. Raises DataError if a table has no column ``sha256``.
    """
    for other in others:
        if KEY not in other.column_names:
            raise DataError(f"a table of columns lacks {KEY!r} (it has {', '.join(other.column_names)})")
        places = pc.index_in(table.column(KEY), value_set=other.column(KEY).combine_chunks())
        for name in other.column_names:
            if name not in table.column_names:
                table = table.append_column(name, other.column(name).take(places))
    return table
