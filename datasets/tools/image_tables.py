"""Parquet tables about images: a row for each, with `url`, `sha256` and any other columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.processing.journal import Journal
from dreamfleet.datasets.processing.runner import Row
from dreamfleet.datasets.storage.storage import Storage

KEYS = ("url", "sha256")


class ImageTable:
    """A Parquet table that grows by columns: images that have all ``columns`` are done, others get new values.

    Values are kept in a journal beside the table until :meth:`save` writes the table. Raises DataError for a file that
    is not such a table.
    """

    def __init__(self, address: str, columns: Iterable[str]) -> None:
        folder, _, self._file = address.rpartition("/")
        self._folder = Storage(folder or ("/" if address.startswith("/") else "."))
        self.address = self._folder.path(self._file)
        self.columns = tuple(columns)
        self.rows: dict[str, dict[str, Any]] = {row["url"]: row for row in self._read()}
        self._journal = Journal(self._folder, self._file)
        for row in self._journal.read():
            self._set(row)

    def has(self, uri: str) -> bool:
        """Return whether an image has a value in all columns."""
        row = self.rows.get(uri, {})
        return all(row.get(name) is not None for name in self.columns)

    def add(self, uri: str, sha256: str, values: Mapping[str, Any]) -> None:
        """Set columns of an image; columns of another content of the image are dropped."""
        row = {"url": uri, "sha256": sha256, "values": dict(values)}
        self._journal.add(row)
        self._set(row)

    def save(self, uris: Iterable[str]) -> pa.Table:
        """Write the table with the images ``uris``, in this order, and remove the journal."""
        rows = [self.rows[uri] for uri in uris if uri in self.rows]
        names = [*KEYS, *dict.fromkeys(name for row in rows for name in row if name not in KEYS)]
        table = pa.table({name: [row.get(name) for row in rows] for name in names})
        self._journal.flush()
        with self._folder.staging(self._file) as path:
            pq.write_table(table, path)
        self._journal.clear()
        return table

    def flush(self) -> None:
        """Write what was added since to the journal."""
        self._journal.flush()

    def _set(self, row: Row) -> None:
        before = self.rows.get(row["url"], {})
        kept = before if before.get("sha256") == row["sha256"] else {}
        self.rows[row["url"]] = {**kept, "url": row["url"], "sha256": row["sha256"], **row["values"]}

    def _read(self) -> list[dict[str, Any]]:
        if not self._folder.exists(self._file):
            return []
        try:
            table = pq.read_table(pa.BufferReader(self._folder.read_bytes(self._file)))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.address} is not a Parquet file ({error}). Choose another name") from error
        if missing := [name for name in KEYS if name not in table.column_names]:
            raise DataError(
                f"{self.address} has no column {missing[0]}: it was not written by this command. Choose another name"
            )
        return table.to_pylist()
