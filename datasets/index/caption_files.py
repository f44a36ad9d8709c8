"""Reads the captions of an image folder: from caption files beside the images, otherwise from metadata tables."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from dreamfleet.datasets.decode_text import decode_text
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index.caption_tables import images_of, read_table
from dreamfleet.datasets.index.image_folder import ImageFolder

CONCURRENT_READS = 32  # caption files read from a bucket at the same time
LISTED = 20  # maximum number of bad files that a message lists


class Captions:
    """The captions of a folder's images; ``column`` names the caption column of its tables, see read_table."""

    def __init__(self, folder: ImageFolder, column: str | None = None) -> None:
        self.folder = folder
        self.column = column
        self.absent: list[tuple[str, str]] = []  # (missing image that a table names, address of the table)
        self._table: dict[str, tuple[str, str]] = {}  # image -> (caption, table)
        self.errors: list[DataError] = []  # errors found in tables
        for table in folder.tables:
            try:
                self._read_table(table)
            except DataError as error:
                self.errors.append(error)

    def of(self, image: str) -> str | None:
        """Return an image's caption without surrounding whitespace, or None. Raises DataError if it is not text."""
        beside = self.folder.caption_file(image)
        caption = self._text(beside) if beside is not None else self._table.get(image, ("", ""))[0]
        return caption.strip() or None

    def of_all(self, images: Sequence[str]) -> list[str | None]:
        """Return the captions of images in order. Raises a single DataError that lists all unreadable captions."""
        if self.folder.storage.is_local:
            found = list(map(self.try_of, images))
        else:  # in parallel, since most of the time is latency
            with ThreadPoolExecutor(CONCURRENT_READS, thread_name_prefix="captions") as pool:
                found = list(pool.map(self.try_of, images))
        refuse_all([*self.errors, *(one for one in found if isinstance(one, DataError))])
        return [one for one in found if not isinstance(one, DataError)]

    def file_of(self, image: str) -> str | None:
        """Return the name of the caption file or table that contains an image's caption; None without a caption."""
        beside = self.folder.caption_file(image)
        return beside if beside is not None or image not in self._table else self._table[image][1]

    def try_of(self, image: str) -> str | DataError | None:
        """Return an image's caption, or the DataError that reading it raised."""
        try:
            return self.of(image)
        except DataError as error:
            return error

    def _text(self, name: str) -> str:
        storage = self.folder.storage
        try:
            return decode_text(storage.read_bytes(name), uri=storage.path(name))
        except StorageError as error:
            raise DataError(f"caption: {error}") from error

    def _read_table(self, table: str) -> None:
        entries = list(read_table(self.folder, table, self.column))
        absent = []
        for entry in entries:
            images = images_of(self.folder, entry.file)
            for image in images:
                self._table[image] = entry.caption, table
            if not images and not self.folder.unreadable.owners(entry.file):
                absent.append(entry.file)
        where = self.folder.storage.path(table)
        if entries and len(absent) == len(entries):
            raise DataError(
                f"{where}: none of the {len(entries)} images it names exists, such as {absent[0]}. A file_name is "
                "relative to the folder of the table; correct the names, or rename the file if it has no captions"
            )
        self.absent += [(name, where) for name in absent]


def refuse_all(errors: Sequence[DataError]) -> None:
    """Raise a single DataError that lists each distinct error once; do nothing if there are no errors."""
    messages = list(dict.fromkeys(map(str, errors)))
    if len(messages) == 1:
        raise errors[0]
    if messages:
        more = f"\n  and {len(messages) - LISTED} more" if len(messages) > LISTED else ""
        raise DataError(
            f"{len(messages)} captions cannot be read:\n  " + "\n  ".join(messages[:LISTED]) + more
        )
