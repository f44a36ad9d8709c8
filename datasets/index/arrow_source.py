"""The source of Arrow files, as Hugging Face's `save_to_disk` writes them: images are read from them by byte ranges."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index.column_scan import columns_in, scan_columns
from dreamfleet.datasets.index.shard_files import names_shards, shard_files
from dreamfleet.datasets.index.sources import Listing, ScanOptions, Source
from dreamfleet.datasets.storage.node_cache import node_copy
from dreamfleet.datasets.storage.storage import read_uri

SCHEME, SUFFIXES = "arrow", (".arrow",)
_FILE_MAGIC = b"ARROW1"
_URI = re.compile(r"arrow://(.*?)#(\d+)-(\d+)(?:#(.*))?", re.DOTALL)


class ArrowSource(Source):
    """Reads `data-00000-of-00004.arrow`, patterns, and folders of Arrow files, also a `DatasetDict` with its splits."""

    def matches(self, url: str) -> bool:
        """Return whether a URL names Arrow files, or a folder that `save_to_disk` wrote."""
        marker = os.path.join(url, "dataset_dict.json")
        return names_shards(url, SUFFIXES) or ("://" not in url and os.path.isfile(marker))

    def scan(self, url: str, options: ScanOptions) -> Listing:
        """List the image of each row with its caption and the other columns.

        Damaged files and rows are listed as bad. Raises DataError if there is no file, or no column of images.
        """
        files = shard_files(url.removeprefix(f"{SCHEME}://"), SUFFIXES)
        return scan_columns(files, options, source=SCHEME, add_rows=_add_rows)

    def read(self, uri: str) -> bytes:
        """Return the bytes of an image, by its range. Raises StorageError."""
        match = _URI.fullmatch(uri)
        if match is None:
            raise StorageError(f"{uri} is not the URI of an image in an Arrow file")
        return read_uri(match[1], start=int(match[2]), end=int(match[3]))


def _add_rows(found: Listing, file: str, options: ScanOptions) -> None:
    number = 0
    with node_copy(file) as path, pa.memory_map(str(path)) as mapped:
        start = mapped.read_buffer().address  # of the whole file, which is not copied
        place = range(start, start + mapped.size() + 1)
        for batch in _batches(mapped):
            _add_batch(found, batch, file, options, place=place, first=number + 1)
            number += batch.num_rows


def _batches(mapped: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an Arrow file in either format, without copying them."""
    mapped.seek(0)
    is_file = mapped.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    mapped.seek(0)
    if is_file:
        reader = pa.ipc.open_file(mapped)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        yield from pa.ipc.open_stream(mapped)


def _add_batch(
    found: Listing, batch: pa.RecordBatch, file: str, options: ScanOptions, *, place: range, first: int
) -> None:
    """Add the images of a batch to a listing; ``place``: the addresses in memory of the mapped file."""
    image, facts, reader = columns_in(batch.schema, file, options)
    rows = batch.select(facts).to_pylist()
    if image is None:
        for number, row in enumerate(rows, first):
            found.add(reader.image(number, row))
        return
    column = batch.column(image.name)
    files = image.file_column(column)
    valid = pc.and_(files.is_valid(), column.is_valid()).to_pylist()
    has_paths = image.is_struct and column.type.get_field_index("path") >= 0
    paths = column.field("path").to_pylist() if has_paths else [None] * len(rows)
    for number, (start, end) in enumerate(_ranges(files, place, file)):
        found.add(
            reader.stored(
                first + number,
                rows[number],
                files[number].as_py() if valid[number] else None,
                scheme=SCHEME,
                place=f"{start}-{end}",
                path=paths[number] or "",
            )
        )


def _ranges(files: pa.Array, place: range, where: str) -> list[tuple[int, int]]:
    """Return the ranges of bytes of the values of a binary array in the file that it was mapped from.

    Raises DataError if they are not in it, because it is compressed.
    """
    _, offsets, data = files.buffers()
    if data is None or data.size == 0:
        return [(0, 0)] * len(files)
    if data.address not in place:
        raise DataError(
            f"{where} is compressed, so that images cannot be read by ranges. Write it uncompressed"
        )
    kind = np.int64 if pa.types.is_large_binary(files.type) else np.int32
    edges = np.frombuffer(offsets, kind)[files.offset : files.offset + len(files) + 1].astype(np.int64)
    edges = edges + (data.address - place.start)
    return list(pairwise(edges.tolist()))
