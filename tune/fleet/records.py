"""The record of a fleet: one line per subject that ended, in numbered files that are written once and merged later.

The record on disk and in a bucket is the same: every file is written atomically, so that a killed driver leaves whole
files, and neither a subject nor its run folder is opened to find out that it is finished.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage

FOLDER = "records"
MERGED = 32  # so many files of a size become one; 100,000 subjects have at most some 100 files


class Records:
    """The record of a fleet in ``records/``; it has one writer.

    A file ``00000032-00000063.jsonl`` holds the appended lines number 32 to 63. A file that lies within a larger one is
    left from an interrupted merge.
    """

    def __init__(self, fleet: Storage):
        self.storage = fleet.child(FOLDER)
        self._spans = _outermost(filter(None, map(_read_span, self.storage.list())))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield all lines, oldest first. Raises StorageError for a damaged file."""
        for span in self._spans:
            for line in self._lines(span):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise StorageError(
                        f"{self.storage.path(_file(span))} is damaged ({error}). Remove it: its subjects are then "
                        "found by the summaries in their run folders"
                    ) from error

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write lines durably as one new file; merge files when there are many."""
        if not lines:
            return
        number = self._spans[-1][1] + 1 if self._spans else 0
        self._write((number, number), [json_text(line) for line in lines])
        size = 1
        while len(same := [span for span in self._spans if span[1] - span[0] + 1 == size]) >= MERGED:
            self._merge(same[:MERGED])
            size *= MERGED

    def _merge(self, spans: Sequence[tuple[int, int]]) -> None:
        self._write((spans[0][0], spans[-1][1]), [line for span in spans for line in self._lines(span)])
        for span in spans:
            self.storage.remove(_file(span))

    def _write(self, span: tuple[int, int], lines: Sequence[str]) -> None:
        self.storage.write_text(_file(span), "".join(f"{line}\n" for line in lines))
        self._spans = _outermost([*self._spans, span])

    def _lines(self, span: tuple[int, int]) -> list[str]:
        # Not splitlines: it also splits at separators inside texts.
        return [line for line in self.storage.read_text(_file(span)).split("\n") if line]


def _file(span: tuple[int, int]) -> str:
    return f"{span[0]:08d}-{span[1]:08d}.jsonl"


def _read_span(name: str) -> tuple[int, int] | None:
    first, _, last = name.removesuffix(".jsonl").partition("-")
    return (int(first), int(last)) if name.endswith(".jsonl") and (first + last).isdigit() else None


def _outermost(spans: Any) -> list[tuple[int, int]]:
    """Return the spans that lie in no other, in order."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(spans, key=lambda span: (span[0], -span[1])):
        if not found or first > found[-1][1]:
            found.append((first, last))
    return found
