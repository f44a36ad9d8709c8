"""Captions the images of a set with models, beside the images, into a folder of text files, or into a table."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.sources import ScanOptions
from dreamfleet.datasets.processing.journal import Journal
from dreamfleet.datasets.processing.mapping import mapper_of
from dreamfleet.datasets.processing.runner import Workers
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.datasets.tools.annotate import Makers, annotate, refuse_unreadable
from dreamfleet.datasets.tools.captions import BEFORE, Composition
from dreamfleet.datasets.tools.image_set import ImageSet, SetImage, list_set
from dreamfleet.datasets.tools.image_tables import ImageTable
from dreamfleet.datasets.tools.tags import Captioned as Read
from dreamfleet.datasets.tools.tags import read_captions, write_captions

TABLE = ".parquet"  # an output of this ending is a table


class Captioned(NamedTuple):
    """The result of captioning a set."""

    captions: dict[str, str]  # captions that were written: name of the image -> text
    skipped: int  # number of images that already had a caption, or were captioned by an interrupted call
    failed: dict[str, str]  # name of the image -> reason
    backup: str | None


class Target(ABC):
    """A place for captions."""

    @abstractmethod
    def is_done(self, image: SetImage) -> bool:
        """Return whether an earlier call has captioned the image."""

    @abstractmethod
    def add(self, image: SetImage, sha256: str, texts: Mapping[str, str], caption: str) -> None:
        """Store the texts of models and the caption of an image."""

    def columns_of(self, image: SetImage) -> Mapping[str, Any]:
        """Return the texts that earlier calls stored for an image, by column."""
        return {}

    def close(self) -> str | None:
        """Complete the output; return the address of a backup, if there is one."""
        return None

    def keep(self) -> None:  # noqa: B027 - most targets store at once
        """Store what was added so far; called also if the work is interrupted."""


class TextFiles(Target):
    """A text file for each image in a folder, written at once; with ``continues``, existing files are kept."""

    def __init__(self, folder: Storage, file_of: Callable[[str], str], *, continues: bool = True) -> None:
        self._folder, self._file_of = folder, file_of
        self._written = set(folder.list("", True)) if continues else set()

    def is_done(self, image: SetImage) -> bool:
        """Return whether the image's file exists."""
        return self._file_of(image.name) in self._written

    def add(self, image: SetImage, sha256: str, texts: Mapping[str, str], caption: str) -> None:
        """Write the caption."""
        self._folder.write_text(self._file_of(image.name), caption + "\n")


class Changes(Target):
    """Changes of the captions beside the images, which are written at the end, after a backup; see write_captions."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._journal = Journal(read.files.storage, "captions")
        self._made = {row["name"]: row["caption"] for row in self._journal.read()}

    def is_done(self, image: SetImage) -> bool:
        """Return whether an interrupted call has captioned the image."""
        return image.name in self._made

    def add(self, image: SetImage, sha256: str, texts: Mapping[str, str], caption: str) -> None:
        """Remember the caption."""
        self._made[image.name] = caption
        self._journal.add({"name": image.name, "caption": caption})

    def keep(self) -> None:
        """Write the journal."""
        self._journal.flush()

    def close(self) -> str | None:
        """Write all captions."""
        made = {name: text for name, text in self._made.items() if name in self._read.texts}
        backup = write_captions(self._read, made, None) if made else None
        self._journal.clear()
        return backup


class TableTarget(Target):
    """A Parquet table with a column for each model, and the composed caption."""

    def __init__(self, table: ImageTable, images: ImageSet, *, again: bool) -> None:
        self._table, self._images, self._again = table, images, again

    def is_done(self, image: SetImage) -> bool:
        """Return whether the table has all columns for the image."""
        return not self._again and self._table.has(image.uri)

    def add(self, image: SetImage, sha256: str, texts: Mapping[str, str], caption: str) -> None:
        """Set the columns of the image."""
        self._table.add(image.uri, sha256, {**texts, BEFORE: caption})

    def columns_of(self, image: SetImage) -> Mapping[str, Any]:
        """Return the row of the image."""
        row = self._table.rows.get(image.uri, {})
        return {name: value for name, value in row.items() if isinstance(value, str)}

    def keep(self) -> None:
        """Write the journal."""
        self._table.flush()

    def close(self) -> str | None:
        """Write the table."""
        self._table.save(image.uri for image in self._images.images)
        return None


def caption_set(
    url: str,
    makers: Makers,
    how: Composition,
    *,
    out: str | None = None,
    workers: Workers = Workers(),  # noqa: B008 - frozen
    batch_size: int = 8,
    caption_column: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Captioned:
    """Caption the images of a set with the models of ``makers``, whose names are the columns of ``how``.

    Without ``out``, captions are written beside the images of a folder; an `out` of ``.parquet`` is a table with a
    column for each model, which later calls extend; other outputs are folders of text files. Rerunning the call
    continues after an interruption. Raises DataError if no image can be read, or a set that is no folder has no
    ``out``.
    """
    found = list_set(url, ScanOptions(caption_column=caption_column, mapper=mapper_of(workers)))
    target, skips = _target(found, how, out, caption_column)
    pending = [image for image in found.images if not target.is_done(image) and not (skips and image.caption)]
    by_name = {image.name: image for image in pending}
    made: dict[str, str] = {}
    failed: dict[str, str] = {}
    try:
        for row in annotate(
            pending, makers, workers, batch_size=batch_size, failed=failed, progress=progress
        ):
            image = by_name[row["name"]]
            texts = {name: how.cleaned(name, text) for name, text in row["values"].items()}
            made[image.name] = how.caption({**target.columns_of(image), **texts}, image.caption)
            target.add(image, row["sha256"], texts, made[image.name])
    finally:
        target.keep()
    backup = target.close()
    refuse_unreadable(failed, found.images)
    return Captioned(made, len(found.images) - len(pending), failed, backup)


def _target(found: ImageSet, how: Composition, out: str | None, column: str | None) -> tuple[Target, bool]:
    """Return where captions are written, and whether images with a caption are skipped."""
    skips = how.existing == "ignore"
    if out is not None and out.endswith(TABLE):
        columns = (*how.columns, BEFORE)
        return TableTarget(ImageTable(out, columns), found, again=how.existing == "replace"), False
    if out is None and not found.is_folder:
        raise DataError(
            f"{found.url} is read by the source {found.source}, beside whose images nothing can be written: use --out "
            "FOLDER, or --out captions.parquet"
        )
    if not found.is_folder:
        return TextFiles(Storage(str(out)), lambda name: os.path.splitext(name)[0] + ".txt"), skips
    read = read_captions(found.url, column)
    if out is not None:
        return TextFiles(Storage(out), read.files.new_text_file), skips
    if skips:
        return TextFiles(read.files.storage, read.files.text_file, continues=False), skips
    return Changes(read), skips
