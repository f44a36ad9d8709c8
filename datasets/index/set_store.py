"""Opens image sets, and stores their tables: `index.parquet`, `errors.parquet` and the columns that commands add.

The tables of a set lie in a folder of their own in `data.cache_dir`, otherwise in this machine's cache. Opening a set
again reads only files that are new or changed since, unless its images are decoded.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import pyarrow as pa
import pyarrow.parquet as pq

from dreamfleet.datasets.config import Concept, DataConfig
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.concepts import load_concepts
from dreamfleet.datasets.index.edits import edits_folder
from dreamfleet.datasets.index.file_hashes import KnownFiles
from dreamfleet.datasets.index.filters import PHASH, rules_of
from dreamfleet.datasets.index.scan_options import excluded_folders, scan_options
from dreamfleet.datasets.index.set_columns import KEY
from dreamfleet.datasets.index.set_table import SetTable, build_set
from dreamfleet.datasets.processing.mapping import Mapper, in_parallel
from dreamfleet.datasets.storage.node_cache import cache_folder
from dreamfleet.datasets.storage.object_store import is_address
from dreamfleet.datasets.storage.probe import probe_storage
from dreamfleet.datasets.storage.storage import Storage

log = logging.getLogger(__name__)

SETS, INDEX, ERRORS, COLUMNS = "sets", "index.parquet", "errors.parquet", "columns"
ROW_GROUP = 65_536


@dataclass
class OpenSet(SetTable):
    """The table of a set with its concept and the folder of its stored tables."""

    concept: Concept
    folder: Storage

    @property
    def address(self) -> str:
        """The address of the stored index."""
        return self.folder.path(INDEX)

    def write_columns(self, name: str, table: pa.Table) -> str:
        """Store columns, such as scores, for the images with the hashes in the column ``sha256``; return their address.

        They replace those stored under the same name before, and are in the table when the set is opened again.
        Raises DataError without that column.
        """
        if KEY not in table.column_names:
            raise DataError(
                f"columns {name!r} lack the column {KEY!r}; they have {', '.join(table.column_names)}"
            )
        if not re.fullmatch(r"[\w-]+", name):
            raise DataError(f"{name!r} cannot be the name of a file of columns: use letters, digits, - and _")
        write_table(self.folder, f"{COLUMNS}/{name}.parquet", table)
        return self.folder.path(COLUMNS, f"{name}.parquet")


def open_set(
    url: str,
    data: DataConfig | None = None,
    *,
    store: Storage | None = None,
    phash: bool = False,
    verify: bool | None = None,
    mapper: Mapper = in_parallel,
) -> OpenSet:
    """Open the set at a URL of any source: index its new and changed images, and store the table.

    ``data``: captions, filters and masks as for training; its own images are not read. ``store``: the folder in place
    of the set's. ``phash``: compute perceptual hashes. ``verify``: decode images, by default those of small sets.
    Raises DataError if the set cannot be read; one without a usable image is empty.
    """
    url = Storage(url).url if is_address(url) else url
    data = data or DataConfig(instance_data_dir=url)
    concept = Concept(instance_data_dir=url, mask_dir=data.mask_dir)
    folder = store or set_folder(url, data)
    return _open(concept, data, folder, {}, phash=phash, verify=verify, mapper=mapper)


def open_sets(
    data: DataConfig,
    *,
    excluded: Mapping[str, str] = MappingProxyType({}),
    phash: bool = False,
    verify: bool | None = None,
    mapper: Mapper = in_parallel,
) -> list[OpenSet]:
    """Open the sets of a recipe, one for each concept; parameters as in :func:`open_set` and ``load_sets``."""
    concepts = load_concepts(data)
    others = excluded_folders(concepts, excluded)
    return [
        _open(
            concept,
            data,
            set_folder(concept.instance_data_dir, data),
            others,
            phash=phash,
            verify=verify,
            mapper=mapper,
        )
        for concept in concepts
    ]


def set_folder(url: str, data: DataConfig) -> Storage:
    """Return the folder of the tables of the set at a URL."""
    root = Storage(data.cache_dir) if data.cache_dir is not None else Storage(cache_folder())
    last = re.sub(r"[^\w.-]+", "-", url.rstrip("/").rpartition("/")[2])[:40].strip(".-")
    digest = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return root.child(SETS, f"{last or 'set'}-{digest}")


def column_file(url: str, name: str) -> str:
    """Return the address of a file for columns of the set at a URL, which a command may write.

    It is beside the set, where edits are, so that every machine finds it; in this machine's cache if nothing can be
    written there.
    """
    beside = edits_folder(url)
    problem = "no folder" if beside is None else probe_storage(beside.url)["error"]
    if beside is not None and problem is None:
        return beside.path(COLUMNS, name)
    log.warning("nothing can be written beside %s (%s): its columns are stored on this machine", url, problem)
    return set_folder(url, DataConfig(instance_data_dir=url)).path(COLUMNS, name)


def stored_columns(url: str, data: DataConfig) -> list[pa.Table]:
    """Return the columns that commands have stored for the set at a URL. Raises DataError for a damaged file."""
    folders = [edits_folder(url), set_folder(url, data)]
    if data.cache_dir is not None:
        folders.append(set_folder(url, data.model_copy(update={"cache_dir": None})))
    return [
        _read(folder, f"{COLUMNS}/{name}")
        for folder in folders
        if folder is not None
        for name in folder.list(COLUMNS)
        if name.endswith(".parquet")
    ]


def stored_phashes(folder: Storage) -> dict[str, str]:
    """Return the perceptual hashes in a stored index, by the hash of the file."""
    if not folder.exists(INDEX):
        return {}
    table = _read(folder, INDEX)
    pairs = zip(table.column(KEY).to_pylist(), table.column(PHASH).to_pylist(), strict=True)
    return {digest: phash for digest, phash in pairs if phash}


def store(table: SetTable, folder: Storage) -> None:
    """Write the index of a set, with excluded images, and its errors."""
    write_table(folder, INDEX, table.rows)
    write_table(folder, ERRORS, table.errors)


def write_table(folder: Storage, name: str, table: pa.Table) -> None:
    """Write a table as a Parquet file, atomically."""
    with folder.staging(name) as path:
        pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP)


def _open(
    concept: Concept,
    data: DataConfig,
    folder: Storage,
    excluded: Mapping[str, str],
    *,
    phash: bool,
    verify: bool | None,
    mapper: Mapper,
) -> OpenSet:
    url = concept.instance_data_dir
    places = [place for place in (url, concept.mask_dir) if place is not None]
    known = KnownFiles(folder, places)
    rules = rules_of(data, concept.where)
    built = build_set(
        url,
        scan_options(concept, data, excluded, mapper),
        max_pixels=data.max_pixels,
        verify=verify,
        phash=phash,
        known=known,
        rules=rules,
        columns=stored_columns(url, data),
        phashes=stored_phashes(folder) if phash or rules.needs_phash else {},
    )
    known.remember(built.rows)
    store(built, folder)
    return OpenSet(built.url, built.rows, built.listing, concept, folder)


def _read(folder: Storage, name: str) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(folder.read_bytes(name)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{folder.path(name)} is broken ({error}). Remove it; it will be written again"
        ) from error
