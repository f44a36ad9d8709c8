"""Edits captions as lists of tags (add, remove, rename, sort), and writes them to caption files and tables."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from dreamfleet.datasets.captions import split_tags
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.index.caption_files import Captions
from dreamfleet.datasets.index.caption_tables import edited_table
from dreamfleet.datasets.index.file_pairing import composed
from dreamfleet.datasets.index.image_folder import ImageFolder
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.datasets.tools.inspect import tag_counts

# Tags that are emoticons, from the list of the WD tagger; their underscores are kept.
_FACES = "0_0 (o)_(o) +_+ +_- ._. <o>_<o> <|>_<|> =_= >_< 3_3 6_9 >_o @_@ ^_^ o_o u_u x_x |_| ||_||"
KAOMOJI = frozenset(_FACES.split())
BACKUPS = ".tags-before-"  # prefix of backup folders; hidden folders are skipped when images are listed

_BRACKET = re.compile(r"(?<!\\)([()])")


@dataclass(frozen=True)
class Edit:
    """Changes of a caption's tags, applied in the order of the fields.

    `remove` and the left side of `replace` may contain `*`. Underscores and spaces are equivalent (`red_hair` is
    `red hair`), as are escaped and unescaped brackets.
    """

    spaces: bool = False  # replace underscores by spaces, except in emoticons
    replace: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()
    add: tuple[str, ...] = ()
    prepend: tuple[str, ...] = ()
    dedupe: bool = False
    sort: bool = False
    trigger: str = ""  # tag that is placed first, once
    escape: bool = False  # escape brackets, which are the webui's syntax for emphasis

    @property
    def changes(self) -> bool:
        """Whether the edit can change anything."""
        return self != Edit()


class Captioned(NamedTuple):
    """The captions of a folder's images in order, None without one; ``column`` is the tables' caption column."""

    files: ImageFolder
    texts: dict[str, str | None]
    column: str | None


class Edited(NamedTuple):
    """The result of editing a folder: captions read, images without a caption, resulting tags, and changes."""

    captions: int
    without: int
    tags: dict[str, int]  # tag -> number of captions, most frequent first
    changed: dict[str, dict[str, str]]  # name of the image -> "before" and "after"
    backup: str | None


def edit_folder(
    folder: str,
    edit: Edit,
    *,
    out: str | None = None,
    dry_run: bool = False,
    create: bool = False,
    caption_column: str | None = None,
) -> Edited:
    """Edit the captions of a folder in place, or write all captions to the new folder `out`.

    With `create`, images without a caption get one. With `dry_run`, nothing is written. Raises DataError as
    read_captions and write_captions do.
    """
    captioned = read_captions(folder, caption_column)
    before = {name: text or "" for name, text in captioned.texts.items() if text is not None or create}
    after = {name: edit_caption(text, edit) for name, text in before.items()}
    changed = {name: text for name, text in after.items() if text != before[name]}
    backup = None
    if not dry_run and (changed or out is not None):
        target = None if out is None else Storage(out)
        backup = write_captions(captioned, changed if target is None else after, target)
    diff = {name: {"before": before[name], "after": text} for name, text in changed.items()}
    bare = sum(text is None for text in captioned.texts.values())
    return Edited(len(before), bare, tag_counts(list(after.values())), diff, backup)


def edit_caption(caption: str, edit: Edit) -> str:
    """Return a caption with its tags edited; each line is a separate caption."""
    lines = [line for line in caption.splitlines() if line.strip()] or [""]
    return "\n".join(", ".join(_edit_tags(split_tags(line), edit)) for line in lines)


def with_spaces(tag: str) -> str:
    """Return a tag with underscores replaced by spaces, except emoticons such as `>_<`."""
    return tag if tag in KAOMOJI else tag.replace("_", " ")


def escape_brackets(tag: str) -> str:
    """Return a tag with a backslash before each unescaped round bracket, except emoticons."""
    return tag if tag in KAOMOJI else _BRACKET.sub(r"\\\1", tag)


def parse_replacement(text: str) -> tuple[str, str]:
    """Parse `old=new`, or `old=>new` for tags with `=`. Raises DataError for anything else."""
    old, found, new = text.partition("=>" if "=>" in text else "=")
    if not found or not old.strip():
        raise DataError(f"replace {text!r}: write old=new, or old=>new if a tag contains =")
    return old.strip(), new.strip()


def read_captions(folder: str | Storage, column: str | None = None) -> Captioned:
    """Read the captions of all images of a folder as in training.

    Raises DataError if there is no folder or no image, and a single error that lists all unreadable captions.
    """
    files = ImageFolder(folder)
    if not files.images:
        raise DataError(f"no image in {files.storage.url}. Name a folder of images (.png, .jpg, .webp ...)")
    texts = Captions(files, column).of_all(files.images)
    return Captioned(files, dict(zip(files.images, texts, strict=True)), column)


def write_captions(captioned: Captioned, changed: dict[str, str], out: Storage | None) -> str | None:
    """Write changed captions (name of the image -> text) in place, or as .txt files into `out`.

    When editing in place, each file is first copied to a hidden backup folder, whose address is returned. An image
    without a caption, or with a caption file that other images share, gets its own file. Raises DataError, before
    anything is written, for captions in tables other than metadata.jsonl, and if `out` is not empty.
    """
    files, storage = captioned.files, captioned.files.storage
    if out is not None:
        if out.list("", True):
            raise DataError(
                f"{out.url} is not empty, and its files are not overwritten. Choose another folder"
            )
        for name, text in changed.items():
            out.write_text(files.new_text_file(name), text + "\n")
        return None
    found = Captions(files, captioned.column)
    tables: dict[str, dict[str, str]] = {}
    written: dict[str, str] = {}
    for name, text in changed.items():
        file = found.file_of(name)
        if file in files.tables:
            tables.setdefault(str(file), {})[name] = text
            continue
        together = files.readers(file) if file is not None else []
        same = len(together) > 1 and all(changed.get(other) == text for other in together)
        written[str(file) if same else files.text_file(name)] = text + "\n"
    written |= {table: edited_table(files, table, texts, captioned.column) for table, texts in tables.items()}
    backup = BACKUPS + time.strftime("%Y%m%d-%H%M%S")
    while storage.exists(backup):
        backup += "-2"
    files_before = set(storage.list("", True))
    existing = [file for file in written if file in files_before]
    for file in existing:
        storage.write_bytes(f"{backup}/{file}", storage.read_bytes(file))
    for file, text in written.items():
        storage.write_text(file, text)
    return storage.path(backup) if existing else None


def _edit_tags(tags: list[str], edit: Edit) -> list[str]:
    if edit.spaces:
        tags = [with_spaces(tag) for tag in tags]
    for old, new in edit.replace:
        matches = _matcher(old)
        tags = [after for tag in tags for after in (split_tags(new) if matches(tag) else [tag])]
    for pattern in edit.remove:
        matches = _matcher(pattern)
        tags = [tag for tag in tags if not matches(tag)]
    if edit.dedupe:
        firsts: dict[str, str] = {}
        for tag in tags:
            firsts.setdefault(_key(tag), tag)
        tags = list(firsts.values())
    if edit.sort:
        tags = sorted(tags, key=lambda tag: (_key(tag).casefold(), tag))
    present = {_key(tag) for tag in tags}
    first = [tag for tag in edit.prepend if _key(tag) not in present]
    last = [tag for tag in edit.add if _key(tag) not in present]
    tags = [*first, *tags, *last]
    if edit.trigger:
        tags = [edit.trigger, *(tag for tag in tags if _key(tag) != _key(edit.trigger))]
    return [escape_brackets(tag) for tag in tags] if edit.escape else tags


def _key(tag: str) -> str:
    """Return a tag normalised for comparison."""
    return with_spaces(composed(tag).replace("\\(", "(").replace("\\)", ")"))


def _matcher(pattern: str) -> Callable[[str], bool]:
    expression = re.compile(".*".join(re.escape(part) for part in _key(pattern).split("*")), re.DOTALL)
    return lambda tag: expression.fullmatch(_key(tag)) is not None
