"""Reads and edits the metadata tables of an image folder: captions in metadata.jsonl, .csv and .parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from dreamfleet.datasets.decode_text import decode_text
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index.image_folder import ImageFolder
from dreamfleet.datasets.json_text import json_text

FILE_COLUMN = "file_name"
CAPTION_COLUMNS = ("text", "caption", "prompt")


class Entry(NamedTuple):
    """One row of a table: line number, path of the image file relative to the image folder, and caption."""

    line: int
    file: str
    caption: str


def read_table(folder: ImageFolder, name: str, column: str | None = None) -> Iterator[Entry]:
    """Yield the rows of a table.

    ``column`` is the name of the caption column, by default the first of text, caption and prompt; names match in any
    case. Raises DataError for invalid rows, and for missing columns with the columns found and those expected.
    """
    where, place = folder.storage.path(name), name.rpartition("/")[0]
    rows = list(_rows(folder, name))
    columns = columns_of(row for _, row in rows)
    if rows and FILE_COLUMN not in columns:
        line = rows[0][0]
        raise DataError(
            f'{where}, line {line}: no column "{FILE_COLUMN}" among {_listed(columns)}. Write {{"file_name": '
            '"a.png", "text": "..."}, or rename the file if it is not a table of captions'
        )
    captions = caption_columns(columns, column)
    if rows and not captions:
        expected = f"the column {column!r} of data.caption_column" if column else " or ".join(CAPTION_COLUMNS)
        raise DataError(
            f"{where}: no captions: it has the columns {_listed(columns)}, but {expected} is expected. Set "
            "data.caption_column to the column of captions, or rename the file if it is not a table of captions"
        )
    for line, row in rows:
        file = row.get(columns[FILE_COLUMN])
        if not isinstance(file, str) or not file:
            raise DataError(
                f'{where}, line {line}: no "file_name". Write {{"file_name": "a.png", "text": "..."}}'
            )
        value = next((row[key] for key in captions if row.get(key) is not None), "")
        lines = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in lines):
            raise DataError(f"{where}, line {line}: the caption of {file} is not text: {value!r}")
        file = file.removeprefix("./")
        yield Entry(line, f"{place}/{file}" if place else file, "\n".join(lines))


def columns_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the columns of a table: lower-case name -> name as written."""
    found: dict[str, str] = {}
    for row in rows:
        for key in row:
            if isinstance(key, str):
                found.setdefault(key.strip().lower(), key)
    return found


def caption_columns(columns: Mapping[str, str], column: str | None) -> list[str]:
    """Return the names, as written, of the columns that can hold a caption; a row's first non-null one is used."""
    wanted = (column.strip().lower(),) if column else CAPTION_COLUMNS
    return [columns[name] for name in wanted if name in columns]


def edited_table(folder: ImageFolder, name: str, texts: Mapping[str, str], column: str | None = None) -> str:
    """Return the text of a .jsonl table with the captions in ``texts`` (image name -> caption) replaced.

    Raises DataError for other table formats.
    """
    if not name.lower().endswith(".jsonl"):
        raise DataError(
            f"{folder.storage.path(name)} cannot be edited in place: write the captions to another folder with --out"
        )
    place, lines = name.rpartition("/")[0], []
    rows = dict(_rows(folder, name))
    captions = caption_columns(columns_of(rows.values()), column)
    file_column = columns_of(rows.values())[FILE_COLUMN]
    for number, line in enumerate(_text(folder, name).split("\n"), 1):
        entry = rows.get(number, {})
        file = str(entry.get(file_column, "")).removeprefix("./")
        new = [
            texts[image]
            for image in images_of(folder, f"{place}/{file}" if place else file)
            if image in texts
        ]
        if file and new:
            key = next((key for key in captions if entry.get(key) is not None), captions[0])
            value = new[0].split("\n") if isinstance(entry.get(key), list) else new[0]
            line = json_text({**entry, key: value})
        lines.append(line)
    return "\n".join(lines)


def images_of(folder: ImageFolder, file: str) -> list[str]:
    """Return the images that a row of a table names; Windows path separators are accepted."""
    return folder.pairs.owners(file) or folder.pairs.owners(file.replace("\\", "/").removeprefix("./"))


def _rows(folder: ImageFolder, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    where = folder.storage.path(name)
    if name.lower().endswith(".parquet"):
        yield from _parquet_rows(folder, name)
    elif name.lower().endswith(".csv"):
        yield from _csv_rows(_text(folder, name), where)
    else:
        yield from _jsonl_rows(_text(folder, name), where)


def _text(folder: ImageFolder, name: str) -> str:
    try:
        return decode_text(folder.storage.read_bytes(name), uri=folder.storage.path(name))
    except StorageError as error:
        raise DataError(f"caption: {error}") from error


def _jsonl_rows(text: str, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = (
                f"{error.msg} at column {error.colno}"
                if isinstance(error, json.JSONDecodeError)
                else "nested too deeply"
            )
            raise DataError(
                f"{where}, line {number}: not JSON ({reason}). Each line is one object; correct or remove the line"
            ) from error
        if not isinstance(entry, dict):
            raise DataError(
                f'{where}, line {number}: write an object such as {{"file_name": "a.png", "text": "..."}}'
            )
        yield number, entry


def _csv_rows(text: str, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for entry in reader:
            yield reader.line_num, entry
    except csv.Error as error:
        raise DataError(f"{where}, line {reader.line_num}: {error}. Correct or remove the line") from error


def _parquet_rows(folder: ImageFolder, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = folder.storage.path(name)
    try:
        rows = pq.read_table(pa.BufferReader(folder.storage.read_bytes(name))).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where} is not a readable Parquet file ({error}). Write it again") from error
    yield from enumerate(rows, 1)


def _listed(columns: Mapping[str, str]) -> str:
    return ", ".join(columns.values()) or "(none)"
