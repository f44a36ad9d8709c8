"""A journal of results beside an output, so that a killed command continues: immutable part files of JSON lines."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage

FOLDER = ".in-progress"  # hidden, so that it is skipped when images are listed
SECONDS, ROWS = 10.0, 2048  # a part is written after so many seconds, or results


class Journal:
    """Rows of results in part files ``.in-progress/NAME-000001.jsonl`` of a folder on disk or in a bucket.

    Each part is written at once and never changed. A process that is killed loses at most the results of the last
    :data:`SECONDS` seconds. ``clear`` removes the parts when the results are stored elsewhere.
    """

    def __init__(self, folder: Storage, name: str, *, seconds: float = SECONDS, rows: int = ROWS) -> None:
        self._folder, self._name = folder, name
        self._seconds, self._rows = seconds, rows
        self._parts = self._existing()
        self._next = max((_number(part) for part in self._parts), default=0) + 1
        self._pending: list[str] = []
        self._written = time.monotonic()

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield all rows in the order in which they were added. Raises StorageError for a broken part."""
        for part in self._parts:
            for line in self._folder.read_text(part).splitlines():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    place = self._folder.path(part)
                    raise StorageError(
                        f"{place} is broken ({error}). Remove it, and run the command again"
                    ) from error
                yield row

    def add(self, row: dict[str, Any]) -> None:
        """Add a row; it is written together with later ones."""
        self._pending.append(json_text(row))
        if len(self._pending) >= self._rows or time.monotonic() - self._written >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Write the rows that were added since the last part."""
        if self._pending:
            part = f"{FOLDER}/{self._name}-{self._next:06d}.jsonl"
            self._folder.write_text(part, "\n".join(self._pending) + "\n")
            self._parts.append(part)
            self._next += 1
            self._pending.clear()
        self._written = time.monotonic()

    def clear(self) -> None:
        """Remove all parts."""
        self._pending.clear()
        for part in self._parts:
            self._folder.remove(part)
        self._parts.clear()
        if self._folder.is_local and not self._folder.list(FOLDER, True):
            self._folder.remove(FOLDER)

    def _existing(self) -> list[str]:
        names = [name for name in self._folder.list(FOLDER) if name.endswith(".jsonl")]
        mine = [name for name in names if name.rpartition("-")[0] == self._name and _number(name) > 0]
        return [f"{FOLDER}/{name}" for name in sorted(mine, key=_number)]


def _number(part: str) -> int:
    text = part.removesuffix(".jsonl").rpartition("-")[2]
    return int(text) if text.isascii() and text.isdigit() else 0
