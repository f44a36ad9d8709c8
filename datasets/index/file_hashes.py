"""Stores hashes and sizes of image files, so that unchanged files are not read again at the start of every run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.concepts import load_concepts
from dreamfleet.datasets.index.index import FileInfo, Index
from dreamfleet.datasets.index.sources import find_source
from dreamfleet.datasets.storage.storage import Storage

FILE = "files.parquet"
_REMEMBERED = ("uri", "mask", "mask_sha256", *FileInfo._fields)


class KnownFiles:
    """Returns the stored hash and size of an image file if its stamp has not changed since the file was read.

    A stamp is the size and modification time of a file on disk, or the size and ETag of an object in a bucket; see
    :meth:`Source.stamps`. The entries are stored in ``files.parquet`` in the folder of the latent cache.
    """

    def __init__(self, cache: Storage, urls: Iterable[str]):
        self._cache = cache
        # Stamps are taken before any file is read: a file that changes after this has another stamp in the next run.
        self._stamps = {uri: stamp for url in urls for uri, stamp in find_source(url).stamps(url).items()}
        self._seen = _read(cache)

    def __call__(self, uri: str) -> FileInfo | None:
        """Return the hash and size of the file at a URI; None if it must be read."""
        stamp, seen = self._seen.get(uri, ("", None))
        return seen if seen is not None and stamp == self._stamps.get(uri) else None

    def remember(self, images: Index | pa.Table) -> None:
        """Add the files of an index, or of a set's table, and write ``files.parquet`` if anything changed."""
        found = dict(self._seen)
        table = images.table if isinstance(images, Index) else images
        columns = {name: table.column(name).to_pylist() for name in _REMEMBERED if name in table.column_names}
        for number, uri in enumerate(columns["uri"]):
            if stamp := self._stamps.get(uri):
                facts = {name: columns[name][number] for name in FileInfo._fields if name in columns}
                older = found[uri][1] if found.get(uri, ("",))[0] == stamp else FileInfo("")
                found[uri] = stamp, older._replace(**{name: v for name, v in facts.items() if v is not None})
            mask, digest = columns["mask"][number], columns["mask_sha256"][number]
            if mask and digest and (stamp := self._stamps.get(mask)):
                found[mask] = stamp, FileInfo(digest)
        if found == self._seen:
            return
        stored: dict[str, list[Any]] = {"uri": list(found), "stamp": [stamp for stamp, _ in found.values()]}
        stored |= {name: [getattr(seen, name) for _, seen in found.values()] for name in FileInfo._fields}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(stored), sink, compression="zstd")
        self._cache.write_bytes(FILE, sink.getvalue().to_pybytes())
        self._seen = found


def known_files(data: DataConfig) -> KnownFiles | None:
    """Load the stored hashes and sizes for the sources that a recipe names; None without ``data.cache_dir``.

    Raises DataError if ``files.parquet`` is damaged.
    """
    if data.cache_dir is None:
        return None
    places = [
        place
        for one in load_concepts(data)
        for place in (one.instance_data_dir, one.class_data_dir, one.mask_dir)
    ]
    return KnownFiles(Storage(data.cache_dir), {place for place in places if place is not None})


def _read(cache: Storage) -> dict[str, tuple[str, FileInfo]]:
    if not cache.exists(FILE):
        return {}
    try:
        table = pq.read_table(pa.BufferReader(cache.read_bytes(FILE)))
        names = [name for name in FileInfo._fields if name in table.column_names]  # older files lack some
        columns = [table.column(name).to_pylist() for name in ("uri", "stamp", *names)]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(
            f"{cache.path(FILE)} is broken ({error}). Remove it; it will be written again"
        ) from error
    if not {"sha256", "width", "height"} <= set(names):
        raise DataError(f"{cache.path(FILE)} is broken. Remove it; it will be written again")
    return {uri: (stamp, FileInfo(*values)) for uri, stamp, *values in zip(*columns, strict=True)}
