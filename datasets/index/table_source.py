"""The source of tables of addresses: CSV, TSV and JSON lines with a column of paths, s3:// or https:// addresses."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, BinaryIO

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.exclusions import BadFile, is_utf8
from dreamfleet.datasets.index.sources import Listing, ScanOptions, Source
from dreamfleet.datasets.index.table_rows import RowReader
from dreamfleet.datasets.index.url_policy import check_url, is_web
from dreamfleet.datasets.index.url_source import fetch
from dreamfleet.datasets.storage.range_reader import open_file

SCHEME = "table"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".ndjson")
MOST_LINE = 16 * 2**20  # bytes of a row that is read
Numbered = tuple[int, Mapping[str, Any] | str]  # number of a row, and the row or why it cannot be read


class TableSource(Source):
    """Reads `images.jsonl`, `images.csv` and the like; local, in a bucket, or at an https address."""

    reads_web = True

    def matches(self, url: str) -> bool:
        """Return whether a URL names a table."""
        path = url.partition("?")[0] if is_web(url) else url
        return path.lower().endswith((*LINES, *DELIMITERS)) and not os.path.isdir(url)

    def scan(self, url: str, options: ScanOptions) -> Listing:
        """List the image of each row; rows that name none are bad, with their number.

        Raises DataError if the table cannot be read or has no column of addresses.
        """
        table = url.removeprefix(f"{SCHEME}://")
        found = Listing([])
        reader = RowReader(table, (), replace(options, caption_column=None))
        with _opened(table, options) as file:
            for number, row in _rows(table, file):
                if isinstance(row, str):
                    found.bad.append(BadFile(f"{table}, row {number}", row))
                    continue
                if not reader.known.issuperset(row):
                    texts = table.lower().endswith(tuple(DELIMITERS))
                    reader = RowReader(table, [*reader.known, *row], options, texts_only=texts)
                found.add(reader.image(number, row))
        if not found.images and reader.known:
            reader.require_url()
        return found


@contextmanager
def _opened(table: str, options: ScanOptions) -> Iterator[BinaryIO]:
    if is_web(table):
        check_url(table, allow_private=options.allow_private)
        yield io.BytesIO(fetch(table, allow_private=options.allow_private))
        return
    with open_file(table) as file:
        yield file


def _rows(table: str, file: BinaryIO) -> Iterator[Numbered]:
    ending = os.path.splitext(table.partition("?")[0] if is_web(table) else table)[1].lower()
    if ending in DELIMITERS:
        yield from _csv_rows(table, file, DELIMITERS[ending])
    else:
        yield from _json_rows(file)


def _json_rows(file: BinaryIO) -> Iterator[Numbered]:
    number = 0
    while line := file.readline(MOST_LINE + 1):
        number += 1
        if len(line) > MOST_LINE:
            while line and not line.endswith(b"\n"):
                line = file.readline(MOST_LINE)
            yield number, f"a line of more than {MOST_LINE:,} bytes"
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"not JSON ({type(error).__name__}: {str(error)[:80]}). Each line is one object"
            continue
        wrong = 'not a JSON object such as {"url": "...", "text": "..."}'
        yield number, row if isinstance(row, dict) else wrong


def _csv_rows(table: str, file: BinaryIO, delimiter: str) -> Iterator[Numbered]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")  # type: ignore[arg-type]
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            if header is None:
                raise DataError(f"{table}: its first line is not a row of column names ({error})") from error
            yield reader.line_num, f"{error}; it is on line {reader.line_num} of the file"
            continue
        if header is None:
            header = [name.strip() for name in row]
        elif row and not all(is_utf8(cell) for cell in row):
            yield reader.line_num, "not UTF-8 text. Save the table as UTF-8"
        elif len(row) > len(header):
            yield reader.line_num, f"{len(row)} cells, but the table has {len(header)} columns. Quote commas"
        elif row:
            yield reader.line_num, {name: cell or None for name, cell in zip(header, row, strict=False)}
    text.detach()
