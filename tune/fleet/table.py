"""Reads a table of subjects: csv, tsv, jsonl, parquet or YAML, on disk or in a bucket."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import yaml

from dreamfleet.datasets.decode_text import decode_text
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.path_field import absolute_path
from dreamfleet.datasets.storage.storage import read_uri

EMPTY = (None, "")


@dataclass(frozen=True)
class Table:
    """The cells of a table by column; ``numbers`` are those of its rows in messages.

    The number of a row is that in a spreadsheet for csv (the header is row 1), the line for jsonl, the entry otherwise.
    Cells of csv are text. ``folder``: that of the file, at which relative paths start. ``errors``: rows that could not
    be read.
    """

    path: str
    folder: str
    numbers: Sequence[int]
    columns: Mapping[str, Sequence[Any]]
    errors: Sequence[str] = ()


def read_rows(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Return rows given in Python as a table; relative paths start at the current directory."""
    columns = _by_column([_flat(row) for row in rows])
    count = max((len(cells) for cells in columns.values()), default=0)
    return Table("the rows of subjects", os.getcwd(), range(1, count + 1), columns)


def read_table(path: str | os.PathLike[str]) -> Table:
    """Read a table of subjects. Raises RecipeError if the file as a whole cannot be read."""
    path = os.fspath(path)
    address = absolute_path(path, os.getcwd())
    reader = _READERS.get(PurePath(path).suffix.lower())
    if reader is None:
        raise RecipeError(f"{path}: a table of subjects is a file with the ending {', '.join(_READERS)}")
    numbers, columns, errors = reader(read_uri(address), path)
    kept = [
        index for index in range(len(numbers)) if any(cells[index] not in EMPTY for cells in columns.values())
    ]
    if len(kept) < len(numbers):
        numbers = [numbers[index] for index in kept]
        columns = {name: [cells[index] for index in kept] for name, cells in columns.items()}
    return Table(path, address.rpartition("/")[0] or "/", numbers, columns, errors)


_Cells = tuple[Sequence[int], Mapping[str, Sequence[Any]], Sequence[str]]


def _read_csv(content: bytes, path: str, delimiter: str = ",") -> _Cells:
    import pyarrow as pa
    import pyarrow.csv as pc

    text = decode_text(content, uri=path)
    try:
        header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    except csv.Error as error:
        raise RecipeError(f"{path}: its header cannot be read ({error})") from error
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise RecipeError(f"{path}: the column {twice[0]!r} exists twice; remove or rename one")
    refused: dict[int, int] = {}  # number of a row -> number of its cells

    def refuse(row: Any) -> str:
        refused[row.number] = row.actual_columns
        return "skip"

    try:
        table = pc.read_csv(
            pa.BufferReader(text.encode()),
            read_options=pc.ReadOptions(use_threads=False),  # rows have numbers only then
            parse_options=pc.ParseOptions(
                delimiter=delimiter,
                newlines_in_values=True,
                ignore_empty_lines=False,
                invalid_row_handler=refuse,
            ),
            convert_options=pc.ConvertOptions(column_types=dict.fromkeys(header, pa.string())),
        )
    except pa.ArrowInvalid as error:
        raise RecipeError(f"{path}: not a table with a header and rows ({error})") from error
    every = (number for number in itertools.count(2) if number not in refused)
    errors = [_wrong_count(number, count, len(header), delimiter) for number, count in refused.items()]
    columns = {name: table.column(name).to_pylist() for name in header}
    return list(itertools.islice(every, table.num_rows)), columns, errors


def _wrong_count(number: int, count: int, columns: int, delimiter: str) -> str:
    """Return the error of a row that has more or fewer cells than the header."""
    mark = "a tab" if delimiter == "\t" else repr(delimiter)
    remedy = (
        f"put text with {mark} in quotes"
        if count > columns
        else f"end the row with {mark} for each empty cell"
    )
    return f"row {number}: {count} cell{'s' * (count > 1)}, and the header has {columns}; {remedy}"


def _read_tsv(content: bytes, path: str) -> _Cells:
    return _read_csv(content, path, delimiter="\t")


def _read_jsonl(content: bytes, path: str) -> _Cells:
    # One object at a time: pyarrow's reader wants the same type in all rows, and a key may be a number or a text.
    numbers, rows, errors = [], [], []
    for number, line in enumerate(decode_text(content, uri=path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            errors.append(f"row {number}: not JSON ({error})")
            continue
        if not isinstance(row, dict):
            errors.append(f'row {number}: write an object such as {{"name": "cat", "images": "cat/"}}')
            continue
        numbers.append(number)
        rows.append(_flat(row))
    return numbers, _by_column(rows), errors


def _read_yaml(content: bytes, path: str) -> _Cells:
    try:
        found = yaml.load(decode_text(content, uri=path), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from error
    if isinstance(found, dict) and all(isinstance(row, dict) for row in found.values()):
        found = [{"name": name, **row} for name, row in found.items()]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise RecipeError(f"{path}: write a list of subjects, such as - {{name: cat, images: cat/}}")
    return range(1, len(found) + 1), _by_column([_flat(row) for row in found]), []


def _read_parquet(content: bytes, path: str) -> _Cells:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        raise RecipeError(f"{path} is not a readable Parquet file ({error}). Write it again") from error
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    return range(1, table.num_rows + 1), columns, []


_READERS: dict[str, Callable[[bytes, str], _Cells]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
}


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a row by dotted keys: {train: {seed: 1}} is the same as {train.seed: 1}."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        nested = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _by_column(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
