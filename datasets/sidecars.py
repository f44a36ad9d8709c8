"""Captions beside pictures: files of the same stem, metadata.jsonl and metadata.csv tables."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dreamfleet.datasets.captions import decode_text
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.storage import Storage

CAPTION_COLUMNS = ("text", "caption", "prompt")
AT_ONCE = 32  # files that are read from a bucket together


class CaptionFinder:
    """Finds the caption of a picture: files beside it, then metadata tables."""

    def __init__(self, storage: Storage, names: Sequence[str], extensions: tuple[str, ...]) -> None:
        self._storage = storage
        self._names = frozenset(names)
        self._extensions = extensions
        self._table: dict[str, tuple[str, str]] = {}  # picture name -> (caption, metadata file)
        for name in sorted(
            names, key=lambda name: (name.count("/"), name)
        ):  # deeper ones are nearer: they win
            place, _, file = name.rpartition("/")
            if file in ("metadata.jsonl", "metadata.csv"):
                for picture, caption in self._read_table(name):
                    self._table[f"{place}/{picture}" if place else picture] = (caption, storage.path(name))

    def of(self, name: str) -> str | None:
        """The caption of the picture `name`, stripped; None when it has none."""
        beside = self._beside(name)
        caption = self._text(beside) if beside is not None else self._table.get(name, ("", ""))[0]
        return caption.strip() or None

    def of_all(self, names: Sequence[str]) -> list[str | None]:
        """The captions of pictures, in their order; from a bucket, whose every answer is waited for, side by side."""
        if self._storage.is_local:
            return [self.of(name) for name in names]
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="captions") as pool:
            return list(pool.map(self.of, names))

    def file_of(self, name: str) -> str | None:
        """The name of the file, beside the picture or a table, that `of` reads its caption from; None without one."""
        beside = self._beside(name)
        if beside is None and name in self._table:
            return self._table[name][1].removeprefix(self._storage.path()).lstrip("/")
        return beside

    def absent(self) -> Iterator[tuple[str, str]]:
        """Pictures a metadata table names that are not in the folder, with the table's place."""
        return ((name, where) for name, (_, where) in self._table.items() if name not in self._names)

    def _beside(self, name: str) -> str | None:
        stem = os.path.splitext(name)[0]
        for extension in self._extensions:
            for beside in (stem + extension, name + extension):  # cat.txt, and cat.png.txt of some taggers
                if beside in self._names:
                    return beside
        return None

    def _text(self, name: str) -> str:
        try:
            return decode_text(self._storage.read_bytes(name), uri=self._storage.path(name))
        except StorageError as error:
            raise DataError(f"caption: {error}") from error

    def _read_table(self, name: str) -> Iterator[tuple[str, str]]:
        text, where = self._text(name), self._storage.path(name)
        read = _jsonl_entries if name.endswith(".jsonl") else _csv_entries
        for line, entry in read(text, where):
            picture = entry.get("file_name")
            if not isinstance(picture, str) or not picture:
                raise DataError(
                    f'{where}, line {line}: no "file_name". Write {{"file_name": "a.png", "text": "..."}}'
                )
            caption = next((entry[key] for key in CAPTION_COLUMNS if entry.get(key) is not None), "")
            if not isinstance(caption, str):
                raise DataError(f"{where}, line {line}: the caption of {picture} is not text: {caption!r}")
            yield picture.removeprefix("./"), caption


def _jsonl_entries(text: str, where: str) -> Iterable[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}, line {number}: not JSON ({error.msg} at column {error.colno}). "
                "Each line is one object; mend or remove the line"
            ) from error
        if not isinstance(entry, dict):
            raise DataError(
                f'{where}, line {number}: write an object such as {{"file_name": "a.png", "text": "..."}}'
            )
        yield number, entry


def _csv_entries(text: str, where: str) -> Iterable[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for entry in reader:
            yield reader.line_num, entry
    except csv.Error as error:
        raise DataError(f"{where}, line {reader.line_num}: {error}. Mend or remove the line") from error
