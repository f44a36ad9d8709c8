"""Makes sure that all ranks read the same files: built on rank 0 and shared, or compared by hash."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.index.sources import can_read
from dreamfleet.datasets.storage.storage import read_uri
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.distributed.shared_table import share_with_table

HASHED_WHOLE = 64 * 2**20  # bytes; larger files are compared by size and samples
SAMPLES, SAMPLE_BYTES = 16, 65536
MOST_HASHED = 256  # files of an index whose contents are compared; the others are compared by size
THREADS = 16
STATED_AT_ONCE = 4096  # files
REMEDY = (
    "With several machines, store it where all of them read the same: a mounted folder, or s3://bucket/prefix"
)


def share_index(
    distributed: DistributedContext, build: Callable[[], Index], *, compares: bool = True
) -> Index:
    """Build an index on rank 0, send it to every rank, and check that each rank reads the same files.

    ``compares``: False if its files have been compared.
    """
    index = share_with_table(
        build, distributed, table_of=lambda built: built.table, with_table=Index.with_table
    )
    if compares:
        check_files(index, distributed)
    return index


def check_files(index: Index, distributed: DistributedContext) -> None:
    """Raise StorageError on every rank unless each of them reads the files that rank 0 indexed.

    Local files are compared by size, and fewer than 2 * ``MOST_HASHED`` of them, evenly spread, by content.
    Of the files in buckets, only the first is checked: every rank must be able to read it.
    """
    if distributed.world == 1:
        return
    sizes = distributed.on_rank_0(lambda: np.fromiter(_sizes(_local_files(index)), np.int64))
    hashed = list(islice(_local_files(index), 0, None, max(1, len(sizes) // MOST_HASHED)))

    def compare_files() -> None:
        if distributed.is_main:
            return
        for (uri, _), size, expected in zip(
            _local_files(index), _sizes(_local_files(index)), sizes, strict=True
        ):
            if size != expected:
                what = "cannot be read" if size < 0 else f"has {size} bytes, and {expected} on rank 0"
                raise _differs(uri, what)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="compare") as pool:
            for (uri, digest), ours in zip(
                hashed, pool.map(_sha256, [uri for uri, _ in hashed]), strict=True
            ):
                if digest != ours:
                    raise _differs(uri, "has different content on rank 0")
        far = next((uri for uri, _ in _files_of(index) if "://" in uri), None)
        if far is not None and not can_read(far):
            raise _differs(far, "cannot be found")

    distributed.on_every_rank(compare_files)


def _files_of(index: Index) -> Iterator[tuple[str, str]]:
    """Yield the URI and hash of each image, and then of each mask."""
    for columns in (("uri", "sha256"), ("mask", "mask_sha256")):
        yield from (
            (uri, digest) for uri, digest in index.lazily(columns, lambda *two: two) if uri is not None
        )


def _local_files(index: Index) -> Iterator[tuple[str, str]]:
    return ((uri, digest) for uri, digest in _files_of(index) if "://" not in uri)


def compare_paths(named: Mapping[str, Sequence[str]], distributed: DistributedContext) -> None:
    """Raise StorageError on every rank unless local files and folders, given by key, are equal on all ranks."""
    if distributed.world == 1:
        return
    local = {f"{key} {path}": path for key, paths in named.items() for path in paths if "://" not in path}
    compare(
        distributed.on_every_rank(lambda: {name: hash_path(path) for name, path in local.items()}),
        distributed,
    )


def compare(found: Mapping[str, str], distributed: DistributedContext) -> None:
    """Raise StorageError on every rank unless the hashes, by name, are equal on all ranks."""
    every = distributed.gather((socket.gethostname(), dict(found)))
    first_host, first = every[0]
    for rank, (host, values) in enumerate(every):
        for name, value in values.items():
            if value != first[name]:
                what = "differs between" if value and first[name] else "exists on only one of"
                raise StorageError(f"{name}: {what} rank {rank} ({host}) and rank 0 ({first_host}). {REMEDY}")


def hash_path(path: str) -> str:
    """Return a hash of a file, or of a folder's files with their names; "" if it does not exist."""
    if not os.path.exists(path):
        return ""
    digest = hashlib.sha256()
    for name, file in _files(Path(path)):
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        with file.open("rb") as handle:
            if size <= HASHED_WHOLE:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
                continue
            for part in range(SAMPLES):
                handle.seek(size * part // SAMPLES)
                digest.update(handle.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files to compare with their relative names: a folder's, or a file and the files read beside it."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
                yield str(file.relative_to(path)), file
        return
    for beside in (path, path.with_name(f"{path.name}.optim"), path.with_suffix(".yaml")):
        if beside.is_file():
            yield beside.name, beside


def _sizes(files: Iterable[tuple[str, str]]) -> Iterator[int]:
    """Yield the files' sizes in bytes, -1 for one that cannot be read."""
    paths = (path for path, _ in files)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="compare") as pool:
        while some := list(islice(paths, STATED_AT_ONCE)):
            yield from pool.map(_size, some)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size if os.access(path, os.R_OK) else -1
    except OSError:
        return -1


def _sha256(path: str) -> str:
    return hashlib.sha256(read_uri(path)).hexdigest()


def _differs(uri: str, what: str) -> StorageError:
    return StorageError(f"{uri} {what}. {REMEDY}")
