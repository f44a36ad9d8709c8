"""The source of Parquet files: images as bytes in a column (also Hugging Face's), or a column of their addresses."""

from __future__ import annotations

import re

from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index.column_scan import columns_in, scan_columns
from dreamfleet.datasets.index.row_group_cache import ROWS_AT_ONCE, open_parquet, row_bytes
from dreamfleet.datasets.index.shard_files import names_shards, shard_files
from dreamfleet.datasets.index.sources import Listing, ScanOptions, Source

SCHEME, SUFFIXES = "parquet", (".parquet",)
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
        return scan_columns(_files(url), options, source=SCHEME, add_rows=_add_rows)

    def read(self, uri: str) -> bytes:
        """Return the bytes of the image in a row. Raises StorageError."""
        match = _URI.fullmatch(uri)
        if match is None:
            raise StorageError(f"{uri} is not the URI of an image in a Parquet file")
        try:
            return row_bytes(match[1], int(match[2]))
        except DataError as error:
            raise StorageError(str(error)) from error


def _files(url: str) -> list[str]:
    return shard_files(url.removeprefix(f"{SCHEME}://"), SUFFIXES)


def _add_rows(found: Listing, file: str, options: ScanOptions) -> None:
    with open_parquet(file) as parquet:
        image, facts, reader = columns_in(parquet.schema_arrow, file, options)
        columns = [*facts, *([image.name] if image else [])]
        batches = parquet.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            if image is None:
                found.add(reader.image(number, row))
                continue
            data, path = image.bytes_of(row[image.name]), image.path_of(row[image.name])
            found.add(reader.stored(number, row, data, scheme=SCHEME, place=str(number - 1), path=path))
