"""The latent cache on disk or in a bucket: Parquet files of latents and their keys, and a manifest of the settings.

Each encoding has a folder `CACHE/512px-<hash>/` with a `manifest.json` that contains its settings.
`latents/NAME.parquet` contains the latents of a few hundred images, and `keys/NAME.parquet` their keys. The keys are
written last and latents without keys are ignored, so the writing process may be killed at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.serve.encoding import Encoding
from dreamfleet.datasets.storage.range_reader import open_ranges
from dreamfleet.datasets.storage.storage import Storage

MANIFEST, LATENTS, KEYS = "manifest.json", "latents", "keys"
GROUP_BYTES = 2**18  # size of a row group, the unit of random reads; it has at least one image
FOOTERS = 1024  # number of Parquet footers kept in memory, about 80 KB each
THREADS = 16
STORED: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "fp16": np.dtype("<f2")}
TENSORS = ("mean", "std", "mask")


class Key(NamedTuple):
    """The key of latents: the hashes of an image and of its mask ("" without one), and whether it is flipped."""

    sha256: str
    mask_sha256: str
    flip: bool


class Entry(NamedTuple):
    """An entry of the cache: the size in pixels, and the location of the latents or the reason why there are none."""

    size: tuple[int, int]
    shard: int
    row: int
    reason: str


def find_manifests(cache: Storage) -> list[dict[str, Any]]:
    """Return all manifests in a cache. Raises DataError for a broken one."""
    return [found for name in cache.list_dirs() if (found := _manifest(cache.child(name))) is not None]


class LatentCache:
    """Reads the latents of one encoding; those written after it was opened are included after :meth:`refresh`."""

    def __init__(self, folder: Storage, encoding: Encoding):
        self.folder, self.encoding = folder, encoding
        self.entries: dict[Key, Entry] = {}
        self._shards: list[tuple[str, int, int]] = []  # (name, size in bytes, rows per group)
        self._footers: dict[int, Any] = {}
        self._seen: set[str] = set()  # names of shards whose keys were read
        self.refresh()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that are stored for each image."""
        return TENSORS if self.encoding.alpha_mask else TENSORS[:2]

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(THREADS, thread_name_prefix="latents")

    def has(self, key: Key, size: tuple[int, int]) -> bool:
        """Return whether the cache has the latents of an image at a size in pixels."""
        found = self.entries.get(key)
        return found is not None and not found.reason and found.size == size

    def read(self, keys: Sequence[Key]) -> list[dict[str, np.ndarray]]:
        """Return the latents of keys in order: `mean` and `std` [C,h,w] and, with masks, `mask` [1,h,w], in float32.

        Only the row groups that contain them are read, several in parallel. Raises StorageError for a broken file.
        """
        entries = [self.entries[key] for key in keys]
        places = [(entry.shard, entry.row // self._shards[entry.shard][2]) for entry in entries]
        groups = list(dict.fromkeys(places))
        tables = dict(zip(groups, self._pool.map(self._read_group, groups), strict=True))
        return [
            self._unpack(tables[place], entry.row % self._shards[entry.shard][2])
            for place, entry in zip(places, entries, strict=True)
        ]

    def read_all(self, keys: Sequence[Key]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yield (position, latents) of each key, in the order of the shards; every file is read once as a whole."""
        wanted: dict[int, list[int]] = {}
        for position, key in enumerate(keys):
            wanted.setdefault(self.entries[key].shard, []).append(position)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="latents") as pool:
            for start in range(0, len(wanted), THREADS):
                shards = list(wanted)[start : start + THREADS]
                for shard, table in zip(shards, pool.map(self._read_shard, shards), strict=True):
                    for position in wanted[shard]:
                        yield position, self._unpack(table, self.entries[keys[position]].row)

    def refresh(self) -> None:
        """Include latents that were written since the cache was opened, also by other processes."""
        names = [
            name.removesuffix(".parquet")
            for name in self.folder.list(KEYS)
            if name.endswith(".parquet") and name.removesuffix(".parquet") not in self._seen
        ]
        there = set(self.folder.list(LATENTS))
        with ThreadPoolExecutor(THREADS, thread_name_prefix="latents") as pool:
            tables = list(pool.map(self._read_keys_of, names))
        for name, table in zip(names, tables, strict=True):
            size = int(table.schema.metadata[b"bytes"])
            if size and (f"{name}.parquet" not in there or self._is_incomplete(name, size)):
                continue  # a file that was removed or copied partially; its images will be encoded again
            self._seen.add(name)
            shard = len(self._shards)
            self._shards.append((name, size, int(table.schema.metadata[b"rows_per_group"])))
            for row, one in enumerate(table.to_pylist()):
                key = Key(one["sha256"], one["mask_sha256"], one["flip"])
                entry = Entry((one["width"], one["height"]), shard, row, one["reason"])
                before = self.entries.get(key)
                if before is None or before.reason:
                    self.entries[key] = entry

    def _is_incomplete(self, name: str, size: int) -> bool:
        return self.folder.is_local and self.folder.size(f"{LATENTS}/{name}.parquet") != size

    def _read_keys_of(self, name: str) -> pa.Table:
        with _explained(self.folder.path(KEYS, f"{name}.parquet")):
            return pq.read_table(pa.BufferReader(self.folder.read_bytes(f"{KEYS}/{name}.parquet")))

    def _read_group(self, place: tuple[int, int]) -> pa.Table:
        shard, group = place
        name, size, _ = self._shards[shard]
        rel, footer = f"{LATENTS}/{name}.parquet", self._footers.get(shard)
        with _explained(self.folder.path(rel)), open_ranges(self.folder, rel, size=size) as source:
            file = pq.ParquetFile(source, metadata=footer, pre_buffer=True, page_checksum_verification=True)
            self._footers[shard] = file.metadata
            if len(self._footers) > FOOTERS:
                self._footers.pop(next(iter(self._footers)), None)
            return file.read_row_group(group, use_threads=False)

    def _read_shard(self, shard: int) -> pa.Table:
        name = self._shards[shard][0]
        rel = f"{LATENTS}/{name}.parquet"
        with _explained(self.folder.path(rel)):
            data = pa.BufferReader(self.folder.read_bytes(rel))
            return pq.read_table(data, use_threads=False, page_checksum_verification=True)

    def _unpack(self, table: pa.Table, row: int) -> dict[str, np.ndarray]:
        shape = tuple(table.column("shape")[row].as_py())
        dtype = STORED[self.encoding.precision]
        found = {}
        for name in self.names:
            is_mask = name == "mask"
            values = np.frombuffer(
                table.column(name)[row].as_buffer(), STORED["float32"] if is_mask else dtype
            )
            found[name] = values.reshape((1, *shape[1:]) if is_mask else shape).astype(np.float32)
        return found


def open_cache(cache: Storage, encoding: Encoding) -> LatentCache:
    """Open the latents of an encoding; there may be none yet. Raises DataError if the manifest has other settings."""
    folder = cache.child(encoding.folder)
    found = _manifest(folder)
    if found is not None and (different := encoding.differences(found)):
        raise DataError(
            f"{folder.path(MANIFEST)} does not match the name of its folder: {', '.join(different)}. Remove "
            f"{folder.url} and encode again"
        )
    return LatentCache(folder, encoding)


def write_manifest(cache: Storage, encoding: Encoding) -> Storage:
    """Create the folder of an encoding with its manifest, and return it."""
    folder = cache.child(encoding.folder)
    if _manifest(folder) is None:
        folder.write_text(MANIFEST, json.dumps(encoding.to_json(), indent=1) + "\n")
    return folder


def write_shard(
    folder: Storage,
    keys: Sequence[tuple[Key, tuple[int, int]]],
    latents: Sequence[Mapping[str, np.ndarray]],
    *,
    bad: Sequence[tuple[Key, tuple[int, int], str]],
    precision: str,
) -> int:
    """Write a shard of latents and keys; ``bad`` are images that could not be encoded, with the reason.

    Returns the number of bytes written. The file name is a hash of the keys, so writing a shard twice gives one file.
    """
    rows = [(*key, *size, "") for key, size in keys] + [(*key, *size, reason) for key, size, reason in bad]
    name = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    size, rows_per_group = 0, 1
    if latents:
        columns: dict[str, list[Any]] = {"shape": [list(one["mean"].shape) for one in latents]}
        for kind in TENSORS:
            if kind in latents[0]:
                stored = STORED["float32" if kind == "mask" else precision]
                columns[kind] = [one[kind].astype(stored).tobytes() for one in latents]
        table = pa.table(columns)
        rows_per_group = max(1, GROUP_BYTES * len(latents) // max(1, table.nbytes))
        size = _write(folder, f"{LATENTS}/{name}.parquet", table, rows_per_group)
    names = ("sha256", "mask_sha256", "flip", "width", "height", "reason")
    table = pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    metadata = {"bytes": str(size), "rows_per_group": str(rows_per_group)}
    _write(folder, f"{KEYS}/{name}.parquet", table.replace_schema_metadata(metadata), len(rows))
    return size


def _write(folder: Storage, rel: str, table: pa.Table, rows_per_group: int) -> int:
    sink = pa.BufferOutputStream()
    # Latents are incompressible; plain pages are read fastest.
    pq.write_table(
        table,
        sink,
        row_group_size=rows_per_group,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    data = sink.getvalue().to_pybytes()
    folder.write_bytes(rel, data)
    return len(data)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Convert the exceptions that pyarrow raises for a broken file into a StorageError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        why = str(error).splitlines()[0]
        raise StorageError(
            f"{path} is broken ({why}). Remove it and run `dreamfleet data cache` again"
        ) from error


def _manifest(folder: Storage) -> dict[str, Any] | None:
    if not folder.exists(MANIFEST):
        return None
    try:
        found = json.loads(folder.read_text(MANIFEST))
    except ValueError as error:
        raise DataError(f"{folder.path(MANIFEST)} is broken ({error}). Remove {folder.url}") from error
    if not isinstance(found, dict):
        raise DataError(f"{folder.path(MANIFEST)} is not a manifest. Remove {folder.url}")
    return found
