"""Reads single images of Parquet files: a row group is unpacked once into this machine's cache, and read by ranges.

Parquet's compressed pages cannot be read in the random order of training, so each machine keeps the images that it
uses as plain bytes: GROUP.bin with one file after the other, GROUP.npy with their places.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index.folder_source import stamp_of_file
from dreamfleet.datasets.index.image_column import ImageColumn, find_image_column
from dreamfleet.datasets.storage.disk import explain_errors
from dreamfleet.datasets.storage.node_cache import cache_folder
from dreamfleet.datasets.storage.range_reader import open_ranges
from dreamfleet.datasets.storage.storage import Storage

ROWS_AT_ONCE = 64
BUFFER = 2**20  # bytes of a column that are read at once: a whole row group may be larger than the memory


class _Layout(NamedTuple):
    """The column of images in a Parquet file, and the numbers of rows before each of its row groups and at the end."""

    image: ImageColumn
    starts: tuple[int, ...]


@contextmanager
def open_parquet(file: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file whose columns are read in small parts. Raises DataError if it is not one."""
    folder, _, name = file.rpartition("/")
    storage = Storage(folder or "/")
    with open_ranges(storage, name, size=storage.size(name)) as source:
        try:
            parquet = pq.ParquetFile(source, pre_buffer=False, buffer_size=BUFFER)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} is not a readable Parquet file ({error}). Write it again") from error
        yield parquet


def row_bytes(file: str, row: int) -> bytes:
    """Return the image in a row, counted from 0. Raises StorageError or DataError if it cannot be read."""
    layout = _layout(file)
    group = int(np.searchsorted(layout.starts, row, side="right")) - 1
    if not 0 <= row < layout.starts[-1]:
        raise StorageError(
            f"{file} has {layout.starts[-1]} rows, and no row {row + 1}. The file was replaced"
        )
    path = _home(file) / f"{group}.bin"
    places = _places(str(path.with_suffix(".npy")), file, group)
    start, end = (int(places[row - layout.starts[group] + more]) for more in (0, 1))
    with explain_errors("read", str(path)), open(path, "rb") as content:
        content.seek(start)
        return content.read(end - start)


@lru_cache(maxsize=4096)
def _layout(file: str) -> _Layout:
    with open_parquet(file) as parquet:
        image = find_image_column(parquet.schema_arrow, file)
        if image is None:
            raise DataError(f"{file} has no column of images any more. The file was replaced")
        counts = [
            parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)
        ]
    return _Layout(image, tuple(int(number) for number in np.cumsum([0, *counts])))


@lru_cache(maxsize=4096)
def _home(file: str) -> Path:
    text = f"{file}\0{stamp_of_file(file) or os.getpid()}"
    return (
        cache_folder()
        / "row-groups"
        / hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    )


@lru_cache(maxsize=1024)
def _places(path: str, file: str, group: int) -> np.ndarray:
    """Return the places of a row group's images in its unpacked file, which is written first if necessary."""
    home = Path(path).parent
    with explain_errors("write", path):
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not os.path.exists(path):
                _unpack(file, group, Path(path))
        return np.load(path, mmap_mode="r")


def _unpack(file: str, group: int, path: Path) -> None:
    image = _layout(file).image
    places, temporary = [0], path.with_suffix(".tmp")
    with open_parquet(file) as parquet, open(temporary, "wb") as content:
        try:
            for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[image.name]):
                for value in image.file_column(batch.column(0)):
                    data = value.as_py() or b""
                    content.write(data)
                    places.append(places[-1] + len(data))
        except pa.ArrowException as error:
            raise DataError(
                f"{file}: row group {group} is damaged ({error}). Write the file again"
            ) from error
    os.replace(temporary, path.with_suffix(".bin"))
    with open(temporary, "wb") as table:
        np.save(table, np.array(places, np.int64))
    os.replace(temporary, path)
