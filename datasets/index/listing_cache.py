"""Keeps what a scan found in a shard or table, in this machine's cache, until the file changes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.index.exclusions import BadFile
from dreamfleet.datasets.index.folder_source import stamp_of_file
from dreamfleet.datasets.index.sources import Listing, SourceImage
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.node_cache import cache_folder
from dreamfleet.datasets.storage.storage import Storage

log = logging.getLogger(__name__)
VERSION = 1  # of the format of an entry, and of the rules by which files are scanned
STAMP, REST = b"stamp", b"rest"


def cached_listing(file: str, options: Mapping[str, Any], make: Callable[[], Listing]) -> Listing:
    """Return the listing of a file from the cache if the file has not changed, else from ``make()``.

    ``options``: what the listing depends on besides the file. An unusable cache only costs time.
    """
    stamp = stamp_of_file(file)
    if not stamp:
        return make()
    key = json_text([VERSION, file, dict(options)])
    name = f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.parquet"
    folder = Storage(cache_folder() / "listings")
    if (found := _load(folder, name, stamp)) is not None:
        return found
    listing = make()
    try:
        with folder.staging(name) as path:
            pq.write_table(_to_table(listing, stamp), path, compression="zstd")
    except (StorageError, OSError, pa.ArrowException) as error:
        log.warning("%s cannot be used as a cache: %s", folder.url, error)
    return listing


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
