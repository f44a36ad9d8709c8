"""The source of Parquet files: images as bytes in a column (also Hugging Face's), or a column of their addresses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dreamfleet.datasets.config import MAX_PIXELS
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index.exclusions import BadFile
from dreamfleet.datasets.index.facts import describe
from dreamfleet.datasets.index.image_column import (
    ImageColumn,
    explain_missing,
    fact_columns,
    find_image_column,
)
from dreamfleet.datasets.index.listing_cache import cached_listing
from dreamfleet.datasets.index.row_group_cache import row_bytes
from dreamfleet.datasets.index.shard_files import names_shards, shard_files
from dreamfleet.datasets.index.sources import Listing, ScanOptions, Source, SourceImage
from dreamfleet.datasets.index.table_rows import RowReader
from dreamfleet.datasets.storage.range_reader import open_ranges
from dreamfleet.datasets.storage.storage import Storage

SCHEME, SUFFIXES = "parquet", (".parquet",)
ROWS_AT_ONCE = 64
BUFFER = 2**20  # bytes of a column that are read at once: a whole row group may be larger than the memory
_URI = re.compile(r"parquet://(.*?)#(\d+)(?:#(.*))?", re.DOTALL)


class ParquetSource(Source):
    """Reads `part.parquet`, `train-{00000..00031}.parquet`, `data/*.parquet`, and folders of Parquet files."""

    def matches(self, url: str) -> bool:
        """Return whether a URL names Parquet files. A `metadata.parquet` is the table of a folder of images."""
        return names_shards(url, SUFFIXES)

    def scan(self, url: str, options: ScanOptions) -> Listing:
        """List the image of each row with its caption and the other columns; read the images once if they are inside.

        Damaged files and rows are listed as bad. Raises DataError if there is no file, or no column of images.
        """
        found = Listing([])
        for listing in options.mapper(partial(scan_file, options=options), _files(url)):
            found.extend(listing)
        return found

    def read(self, uri: str) -> bytes:
        """Return the bytes of the image in a row. Raises StorageError."""
        match = _URI.fullmatch(uri)
        if match is None:
            raise StorageError(f"{uri} is not the URI of an image in a Parquet file")
        try:
            return row_bytes(match[1], int(match[2]), opened=opened)
        except DataError as error:
            raise StorageError(str(error)) from error


def scan_file(file: str, options: ScanOptions) -> Listing:
    """List the images in one Parquet file, from this machine's cache if the file has not changed."""
    keys = {"source": SCHEME, "column": options.caption_column, "private": options.allow_private}
    return cached_listing(file, keys, lambda: _scan(file, options))


@contextmanager
def opened(file: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file whose columns are read in small parts. Raises DataError if it is not one."""
    folder, _, name = file.rpartition("/")
    storage = Storage(folder or "/")
    with open_ranges(storage, name, size=storage.size(name)) as source:
        try:
            parquet = pq.ParquetFile(source, pre_buffer=False, buffer_size=BUFFER)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} is not a readable Parquet file ({error}). Write it again") from error
        yield parquet


def _files(url: str) -> list[str]:
    return shard_files(url.removeprefix(f"{SCHEME}://"), SUFFIXES)


def _scan(file: str, options: ScanOptions) -> Listing:
    found, number = Listing([]), 0
    try:
        with opened(file) as parquet:
            schema = parquet.schema_arrow
            image = find_image_column(schema, file)
            reader = RowReader(file, fact_columns(schema), options)
            if image is None and reader.url is None:
                raise explain_missing(schema, file)
            columns = [*fact_columns(schema), *([image.name] if image else [])]
            for batch in parquet.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    one = _stored(file, number, row, image, reader) if image else reader.image(number, row)
                    (found.bad if isinstance(one, BadFile) else found.images).append(one)  # type: ignore[arg-type]
    except StorageError as error:
        found.bad.append(BadFile(file, str(error)))
    except (pa.ArrowException, OSError) as error:
        reason = f"damaged in or after row {number + 1} ({str(error).splitlines()[0]}). Write the file again"
        found.bad.append(BadFile(file, reason))
    return found


def _stored(
    file: str, number: int, row: Mapping[str, Any], image: ImageColumn, reader: RowReader
) -> SourceImage | BadFile:
    """Return the image whose bytes a row holds, counted from 1."""
    value = row[image.name]
    name = image.path_of(value)
    uri = f"{SCHEME}://{file}#{number - 1}" + (f"#{name}" if name else "")
    data = image.bytes_of(value)
    where = f"row {number}: "
    if data is None:
        return BadFile(uri, f"{where}it holds no image")
    try:
        info = describe(data, uri=uri, max_pixels=MAX_PIXELS)
        caption = reader.caption(row)
    except DataError as error:
        return BadFile(uri, where + str(error).removeprefix(f"{uri}: "))
    facts = {key: fact for key, fact in reader.facts(row).items() if key != image.name}
    return SourceImage(
        uri,
        caption,
        info.sha256,
        info.width,
        info.height,
        bytes=info.bytes,
        format=info.format,
        orientation=info.orientation,
        name=f"{file.rpartition('/')[2].removesuffix('.parquet')}/{name.rpartition('/')[2] or f'{number:08d}'}",
        columns={**facts, "row": number},
    )
