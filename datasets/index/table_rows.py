"""Turns the rows of a table into images: finds the columns of addresses, captions and masks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urljoin, urlsplit

from dreamfleet.datasets.config import MAX_PIXELS
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.images.image_formats import IMAGE_SUFFIXES
from dreamfleet.datasets.index.caption_tables import caption_columns, columns_of
from dreamfleet.datasets.index.exclusions import BadFile, printable
from dreamfleet.datasets.index.facts import describe
from dreamfleet.datasets.index.sources import ScanOptions, SourceImage
from dreamfleet.datasets.index.url_policy import check_url, is_web
from dreamfleet.datasets.index.url_source import url_uri
from dreamfleet.datasets.path_field import absolute_path

# Names of columns, in the order of preference; in any case.
URL_COLUMNS = (
    "url",
    "image_url",
    "uri",
    "image_path",
    "file_name",
    "filename",
    "filepath",
    "path",
    "image",
    "img",
)
MASK_COLUMNS = ("mask", "mask_url", "mask_path")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class RowReader:
    """Makes images of the rows of one table, whose rows are mappings from column names to values.

    ``texts_only``: all values are texts, and those that look like numbers are numbers for conditions. Raises DataError,
    when it is created, if the column of ``data.caption_column`` is missing.
    """

    def __init__(self, table: str, columns: Iterable[str], options: ScanOptions, *, texts_only: bool = False):
        self.table, self.allow_private, self.texts_only = table, options.allow_private, texts_only
        self.known = frozenset(columns)
        self.columns = columns_of([dict.fromkeys(columns)])
        caption_column = options.caption_column
        self.captions = caption_columns(self.columns, caption_column)
        self.url = self._first(URL_COLUMNS)
        self.mask = self._first(MASK_COLUMNS)
        if caption_column and not self.captions:
            raise DataError(
                f"{table}: no column {caption_column!r} of data.caption_column; it has {self._listed}. Correct the name"
            )

    def require_url(self) -> None:
        """Raise DataError unless a column has addresses of images."""
        if self.url is None:
            raise DataError(
                f"{self.table}: no column with addresses of images; it has {self._listed}. Call the column "
                f"{' or '.join(URL_COLUMNS[:3])}"
            )

    def image(self, number: int, row: Mapping[str, Any]) -> SourceImage | BadFile:
        """Return the image of row ``number``, counted from 1, or why it has none."""
        where = f"{self.table}, row {number}"
        try:
            address = self._address(row.get(self.url or ""), "the address of the image")
            mask = row.get(self.mask) if self.mask else None
            mask_uri = self._address(mask, "the mask") if mask else None
            caption = self.caption(row)
        except DataError as error:
            return BadFile(where, str(error))
        digest = row.get(self.columns.get("sha256", ""), "")
        sha256 = digest if isinstance(digest, str) and _SHA256.fullmatch(digest) else ""
        return SourceImage(
            address,
            caption,
            sha256,
            mask=mask_uri,
            name=self._name(number, address),
            columns={**self.facts(row), "row": number},
        )

    def stored(
        self, number: int, row: Mapping[str, Any], data: bytes | None, *, scheme: str, place: str, path: str
    ) -> SourceImage | BadFile:
        """Return the image whose file ``data`` is stored in row ``number``, counted from 1, or why it is not usable.

        The source ``scheme`` reads it again from ``place`` in the table. ``path``: the file's name in the row, if any.
        """
        uri = f"{scheme}://{self.table}#{place}" + (f"#{path}" if path else "")
        try:
            if data is None:
                raise DataError("it holds no image")
            info = describe(data, uri=uri, max_pixels=MAX_PIXELS)
            caption = self.caption(row)
        except DataError as error:
            return BadFile(uri, f"row {number}: " + str(error).removeprefix(f"{uri}: "))
        stem = self.table.rpartition("/")[2].removesuffix(f".{scheme}")
        return SourceImage(
            uri,
            caption,
            info.sha256,
            info.width,
            info.height,
            bytes=info.bytes,
            format=info.format,
            orientation=info.orientation,
            name=f"{stem}/{path.rpartition('/')[2] or f'{number:08d}'}",
            columns={**self.facts(row), "row": number},
        )

    def caption(self, row: Mapping[str, Any]) -> str | None:
        """Return the caption in a row, with one line for each of several. Raises DataError if it is not text."""
        value = next((row[name] for name in self.captions if row.get(name) is not None), None)
        lines = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(line, str) for line in lines):
            raise DataError(f"the caption is not text but {_shown(value)}")
        return "\n".join(str(line) for line in lines).strip() or None if value is not None else None

    def facts(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the other values of a row that conditions can use: texts, numbers, and lists of texts."""
        used = {self.url, self.mask, *self.captions}
        facts = {name: value for name, value in row.items() if name not in used and is_fact(value)}
        return {name: _number(value) for name, value in facts.items()} if self.texts_only else facts

    def _address(self, value: Any, what: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{what} is not text but {_shown(value)}")
        value = urljoin(self.table, value.strip()) if is_web(self.table) else value.strip()
        if is_web(value):
            check_url(value, allow_private=self.allow_private)
            return url_uri(value, allow_private=self.allow_private)
        if is_web(self.table):
            raise DataError(f"{what} is {value[:80]!r}: a table on the web can name web addresses only")
        if not printable(value).isprintable():
            raise DataError(f"{what} has characters that no address has: {value[:80]!r}")
        return absolute_path(value, self.table.rpartition("/")[0] or "/")

    def _first(self, names: Sequence[str]) -> str | None:
        return next((self.columns[name] for name in names if name in self.columns), None)

    def _name(self, number: int, address: str) -> str:
        ending = os.path.splitext(urlsplit(address).path)[1].lower()
        stem = os.path.splitext(self.table.rpartition("/")[2])[0]
        return f"{stem}/{number:08d}{ending if ending in IMAGE_SUFFIXES else ''}"

    @property
    def _listed(self) -> str:
        return f"the columns {', '.join(self.columns.values())}" if self.columns else "no columns"


def is_fact(value: Any) -> bool:
    """Return whether conditions can use a value: a text, a number, a boolean, or a list of texts."""
    texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return texts or isinstance(value, str | int | float | bool)


def _shown(value: Any) -> str:
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _number(value: Any) -> Any:
    if not isinstance(value, str) or not value or value[0] not in "0123456789-.":
        return value or None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
