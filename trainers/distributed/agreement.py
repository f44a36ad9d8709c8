"""Makes sure that all ranks read the same files: built on rank 0 and shared, or compared by hash."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.index.sources import can_read
from dreamfleet.datasets.storage.storage import read_uri
from dreamfleet.trainers.distributed.context import DistributedContext

HASHED_WHOLE = 64 * 2**20  # bytes; larger files are compared by size and samples
SAMPLES, SAMPLE_BYTES = 16, 65536
MOST_HASHED = 256  # files of an index whose contents are compared; the others are compared by size
THREADS = 16
REMEDY = (
    "With several machines, store it where all of them read the same: a mounted folder, or s3://bucket/prefix"
)


def share_index(distributed: DistributedContext, build: Callable[[], Index]) -> Index:
    """Build an index on rank 0, send it to every rank, and check that each rank reads the same files."""
    index = distributed.on_rank_0(build)
    check_files(index, distributed)
    return index


def check_files(index: Index, distributed: DistributedContext) -> None:
    """Raise StorageError on every rank unless each of them reads the files that rank 0 indexed.

    Local files are compared by size, and fewer than 2 * ``MOST_HASHED`` of them, evenly spread, by content.
    Of the files in buckets, only the first is checked: every rank must be able to read it.
    """
    if distributed.world == 1:
        return
    files = [
        (uri, digest)
        for name, digests in (("uri", "sha256"), ("mask", "mask_sha256"))
        for uri, digest in zip(index.column(name), index.column(digests), strict=True)
        if uri is not None
    ]
    uris, hashes = [uri for uri, _ in files], [digest for _, digest in files]
    local = [number for number, uri in enumerate(uris) if "://" not in uri]
    sizes = distributed.on_rank_0(lambda: _sizes([uris[number] for number in local]))
    hashed = local[:: max(1, len(local) // MOST_HASHED)]

    def compare_files() -> None:
        if distributed.is_main:
            return
        for number, ours, theirs in zip(local, _sizes([uris[n] for n in local]), sizes, strict=True):
            if ours != theirs:
                what = "cannot be read" if ours is None else f"has {ours} bytes, and {theirs} on rank 0"
                raise _differs(uris[number], what)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="compare") as pool:
            for number, digest in zip(hashed, pool.map(_sha256, [uris[n] for n in hashed]), strict=True):
                if digest != hashes[number]:
                    raise _differs(uris[number], "has different content on rank 0")
        far = next((uri for uri in uris if "://" in uri), None)
        if far is not None and not can_read(far):
            raise _differs(far, "cannot be found")

    distributed.on_every_rank(compare_files)


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


def _sizes(paths: Sequence[str]) -> list[int | None]:
    """Return the files' sizes in bytes, None for one that cannot be read."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="compare") as pool:
        return list(pool.map(_size, paths, chunksize=256))


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size if os.access(path, os.R_OK) else None
    except OSError:
        return None


def _sha256(path: str) -> str:
    return hashlib.sha256(read_uri(path)).hexdigest()


def _differs(uri: str, what: str) -> StorageError:
    return StorageError(f"{uri} {what}. {REMEDY}")
