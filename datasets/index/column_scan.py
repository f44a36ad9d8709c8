"""Lists the rows of Parquet and Arrow files, which have images in a column or in files that a column names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pyarrow as pa

from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.index.exclusions import BadFile
from dreamfleet.datasets.index.image_column import (
    ImageColumn,
    explain_missing,
    fact_columns,
    find_image_column,
)
from dreamfleet.datasets.index.listing_cache import scan_files
from dreamfleet.datasets.index.sources import Listing, ScanOptions
from dreamfleet.datasets.index.table_rows import RowReader

# Adds each row of a file to a listing, as an image or as bad, in order.
AddRows = Callable[[Listing, str, ScanOptions], None]


def scan_columns(files: Sequence[str], options: ScanOptions, *, source: str, add_rows: AddRows) -> Listing:
    """List the images in several files, from this machine's cache if they have not changed.

    A damaged file is listed as bad besides the rows that were read before the damage.
    """
    keys = {"source": source, "column": options.caption_column, "private": options.allow_private}
    scan = partial(scan_rows, options=replace(options, excluded={}, edits_for=None), add_rows=add_rows)
    return scan_files(files, scan, keys, options.mapper)


def columns_in(
    schema: pa.Schema, file: str, options: ScanOptions
) -> tuple[ImageColumn | None, list[str], RowReader]:
    """Return the column of image files, the other columns to read, and the reader of their rows.

    Raises DataError if a file has neither a column of images nor one of addresses.
    """
    image, facts = find_image_column(schema, file), fact_columns(schema)
    reader = RowReader(file, facts, options)
    if image is None and reader.url is None:
        raise explain_missing(schema, file)
    return image, facts, reader


def scan_rows(file: str, options: ScanOptions, add_rows: AddRows) -> Listing:
    """List the images in one file."""
    found = Listing([])
    try:
        add_rows(found, file, options)
    except StorageError as error:
        found.bad.append(BadFile(file, str(error)))
    except (pa.ArrowException, OSError) as error:
        row = len(found.images) + len(found.bad) + 1
        reason = f"damaged in or after row {row} ({str(error).splitlines()[0]}). Write the file again"
        found.bad.append(BadFile(file, reason))
    return found
