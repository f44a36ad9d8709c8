"""Keeps what a scan found in a shard or table, in this machine's cache, until the file changes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.index.exclusions import BadFile
from dreamfleet.datasets.index.folder_source import stamp_of_file
from dreamfleet.datasets.index.sources import Listing, SourceImage
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.processing.mapping import Mapper, in_threads
from dreamfleet.datasets.storage.node_cache import cache_folder
from dreamfleet.datasets.storage.storage import Storage

log = logging.getLogger(__name__)
VERSION = 1  # of the format of an entry, and of the rules by which files are scanned
STAMP, REST = b"stamp", b"rest"


def scan_files(
    files: Sequence[str], scan: Callable[[str], Listing], keys: Mapping[str, Any], mapper: Mapper
) -> Listing:
    """Return the listings of several files, in their order, as one: those of unchanged files from the cache.

    The others are scanned by ``mapper``; ``scan`` must be picklable. ``keys``: what a listing depends on besides its
    file. An unusable cache only costs time.
    """
    cache = _Cache(keys)
    stamps = list(in_threads(stamp_of_file, files))
    kept = dict(enumerate(in_threads(cache.load, list(zip(files, stamps, strict=True)))))
    missing = [number for number in kept if kept[number] is None]
    scanned = zip(
        missing, mapper(scan, [files[number] for number in missing]) if missing else (), strict=True
    )
    found = Listing([])
    for number in range(len(files)):
        listing = kept.pop(number)
        if listing is None:
            listing = next(scanned)[1]
            cache.store(files[number], stamps[number], listing)
        found.extend(listing)
    next(scanned, None)  # ends the mapper
    return found


class _Cache:
    """The listings of files in this machine's cache, for scans that depend on the same keys."""

    def __init__(self, keys: Mapping[str, Any]) -> None:
        self._keys = dict(keys)
        self._folder = Storage(cache_folder() / "listings")
        self._usable = True

    def load(self, known: tuple[str, str]) -> Listing | None:
        """Return the listing of a file with a stamp; None if there is none."""
        file, stamp = known
        return _load(self._folder, self._name(file), stamp) if stamp else None

    def store(self, file: str, stamp: str, listing: Listing) -> None:
        """Keep a listing; without a stamp, the file may change unseen, and nothing is kept."""
        if not (stamp and self._usable):
            return
        try:
            with self._folder.staging(self._name(file)) as path:
                pq.write_table(_to_table(listing, stamp), path, compression="zstd")
        except (StorageError, OSError, pa.ArrowException) as error:
            self._usable = False
            log.warning("%s cannot be used as a cache: %s", self._folder.url, error)

    def _name(self, file: str) -> str:
        key = json_text([VERSION, file, self._keys])
        return f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.parquet"


def _load(folder: Storage, name: str, stamp: str) -> Listing | None:
    try:
        if not folder.exists(name):
            return None
        table = pq.read_table(pa.BufferReader(folder.read_bytes(name)))
        metadata = table.schema.metadata or {}
        if metadata.get(STAMP) != stamp.encode():
            return None
        rest = json.loads(metadata[REST])
        columns = [table.column(name).to_pylist() for name in SourceImage._fields]
    except (StorageError, OSError, pa.ArrowException, KeyError, ValueError) as error:
        log.warning("%s is broken, and made again: %s", folder.path(name), error)
        return None
    images = [
        SourceImage._make((*values[:-1], json.loads(values[-1]) if values[-1] else None))
        for values in zip(*columns, strict=True)
    ]
    return Listing(images, [BadFile(*one) for one in rest["bad"]], others=Counter(rest["others"]))


def _to_table(listing: Listing, stamp: str) -> pa.Table:
    columns: dict[str, list[Any]] = {
        name: [getattr(image, name) for image in listing.images] for name in SourceImage._fields
    }
    columns["columns"] = [json_text(dict(value)) if value else None for value in columns["columns"]]
    integers = ("width", "height", "bytes", "orientation")
    table = pa.table(
        {
            name: pa.array(values, pa.int64() if name in integers else pa.string())
            for name, values in columns.items()
        }
    )
    rest = json_text({"bad": [list(one) for one in listing.bad], "others": dict(listing.others)})
    return table.replace_schema_metadata({STAMP: stamp.encode(), REST: rest.encode()})
