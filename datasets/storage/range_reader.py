"""Reads byte ranges of files, on disk or in a bucket, through the file interface of pyarrow."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa

from dreamfleet.datasets.storage.disk import explain_errors
from dreamfleet.datasets.storage.object_store import Bucket, bucket_at
from dreamfleet.datasets.storage.storage import Storage

AHEAD = 8 * 2**20


@contextmanager
def open_ranges(storage: Storage, rel: str, *, size: int) -> Iterator[pa.NativeFile]:
    """Open a file of ``size`` bytes: memory-mapped on disk, by range requests in a bucket. Raises StorageError."""
    path = storage.path(rel)
    if storage.is_local:
        with explain_errors("read", path):
            mapped = pa.memory_map(path)
        with mapped:
            yield mapped
        return
    with pa.PythonFile(_Ranges(bucket_at(path), path, size), mode="r") as file:
        yield file


@contextmanager
def open_file(address: str) -> Iterator[BinaryIO]:
    """Open a file on disk or in a bucket, to read it mostly in order: in a bucket, AHEAD bytes at once."""
    folder, _, name = address.rpartition("/")
    storage = Storage(folder or "/")
    if storage.is_local:
        path = storage.path(name)
        with explain_errors("read", path):
            file = open(path, "rb")  # noqa: SIM115  closed below
        with file:
            yield file
        return
    with io.BufferedReader(_Ranges(bucket_at(address), address, storage.size(name)), AHEAD) as ahead:
        yield ahead


class _Ranges(io.RawIOBase):
    """A file in a bucket; each read is one range request."""

    def __init__(self, bucket: Bucket, path: str, size: int):
        super().__init__()
        self._bucket, self._path, self._size, self._at = bucket, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        start, end = self._at, self._size if size < 0 else min(self._size, self._at + size)
        if start >= end:
            return b""
        self._at = end
        return self._bucket.run(
            "read", self._path, lambda fs, key: bytes(fs.cat_file(key, start=start, end=end))
        )
