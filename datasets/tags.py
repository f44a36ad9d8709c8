"""Captions as lists of tags: added, removed, renamed, put in order; pure text, and the files it is kept in."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dreamfleet.datasets.captions import split_tags
from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.masks import pictures_among, visible
from dreamfleet.datasets.sidecars import CAPTION_COLUMNS, CaptionFinder
from dreamfleet.datasets.storage import Storage
from dreamfleet.datasets.survey import tag_counts

# Faces that are tags; the WD tagger's list, whose underscores stay.
_FACES = "0_0 (o)_(o) +_+ +_- ._. <o>_<o> <|>_<|> =_= >_< 3_3 6_9 >_o @_@ ^_^ o_o u_u x_x |_| ||_||"
KAOMOJI = frozenset(_FACES.split())
BACKUPS = ".tags-before-"  # hidden: no picture or caption is looked for there

_BRACKET = re.compile(r"(?<!\\)([()])")


@dataclass(frozen=True)
class Edit:
    """What is done to a caption's tags, in this order; `remove` and the left of `replace` may hold `*`.

    A tag matches whatever its underscores and escaped brackets: `red_hair` is `red hair`.
    """

    spaces: bool = False  # for underscores, faces excepted
    replace: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()
    add: tuple[str, ...] = ()
    prepend: tuple[str, ...] = ()
    dedupe: bool = False
    sort: bool = False
    trigger: str = ""  # comes first, once
    escape: bool = False  # brackets, which mean emphasis in the webui

    @property
    def changes(self) -> bool:
        """False for an edit that leaves everything as it is."""
        return self != Edit()


class Caption(NamedTuple):
    """A picture's caption, and the file (caption or table) that holds it; both None where there is none."""

    text: str | None
    file: str | None


class Edited(NamedTuple):
    """What editing a folder did: captions read, pictures without one, tags afterwards, and what changed."""

    captions: int
    without: int
    tags: dict[str, int]  # most frequent first
    changed: dict[str, dict[str, str]]  # picture's name -> "before" and "after"
    backup: str | None


def edit_folder(
    folder: str, edit: Edit, *, out: str | None = None, dry_run: bool = False, create: bool = False
) -> Edited:
    """Edit the captions of a folder in place or, all of them, into the new folder `out`.

    With `create` pictures without a caption get one too. Raises DataError as read_captions and write_captions do.
    """
    storage = Storage(folder)
    captions = read_captions(storage)
    before = {name: one.text or "" for name, one in captions.items() if one.text is not None or create}
    after = {name: edit_caption(text, edit) for name, text in before.items()}
    changed = {name: text for name, text in after.items() if text != before[name]}
    backup = None
    if not dry_run and (changed or out is not None):
        target = None if out is None else Storage(out)
        backup = write_captions(storage, captions, changed if target is None else after, target)
    diff = {name: {"before": before[name], "after": text} for name, text in changed.items()}
    bare = sum(one.text is None for one in captions.values())
    return Edited(len(before), bare, tag_counts(list(after.values())), diff, backup)


def edit_caption(caption: str, edit: Edit) -> str:
    """Edit the tags of a caption; each of several lines is a caption of its own."""
    lines = [line for line in caption.splitlines() if line.strip()] or [""]
    return "\n".join(", ".join(_edit_tags(split_tags(line), edit)) for line in lines)


def with_spaces(tag: str) -> str:
    """Put spaces for underscores, faces such as `>_<` excepted."""
    return tag if tag in KAOMOJI else tag.replace("_", " ")


def escape_brackets(tag: str) -> str:
    """Put a backslash before round brackets that have none, outside faces."""
    return tag if tag in KAOMOJI else _BRACKET.sub(r"\\\1", tag)


def parse_replacement(text: str) -> tuple[str, str]:
    """Read `old=new` (or `old=>new` for faces such as `=_=`). DataError for what is neither."""
    old, found, new = text.partition("=>" if "=>" in text else "=")
    if not found or not old.strip():
        raise DataError(f"replace {text!r}: write old=new, or old=>new where a tag holds =")
    return old.strip(), new.strip()


def read_captions(storage: Storage, extensions: Sequence[str] = (".txt", ".caption")) -> dict[str, Caption]:
    """Read the captions of all pictures of a folder as training would: picture's name -> caption, by name.

    Raises DataError when there is no folder or no picture.
    """
    if not storage.exists():
        raise DataError(f"folder {storage.url} does not exist. Check the path")
    names = visible(storage.list("", True))
    pictures = pictures_among(names)
    if not pictures:
        raise DataError(f"no picture in {storage.url}. Name a folder of pictures (.png, .jpg, .webp ...)")
    finder = CaptionFinder(storage, names, tuple(extensions))
    texts = finder.of_all(pictures)
    return {name: Caption(text, finder.file_of(name)) for name, text in zip(pictures, texts, strict=True)}


def write_captions(
    storage: Storage, captions: dict[str, Caption], changed: dict[str, str], out: Storage | None
) -> str | None:
    """Write changed captions (picture's name -> text) where they were, or as .txt files into `out`.

    In place each file is first copied to a hidden folder, whose address is returned. Pictures without a caption get a
    .txt file. Raises DataError, before anything is written, for captions in metadata.csv, and for an `out` that
    is in use.
    """
    if out is not None:
        if out.list("", True):
            raise DataError(
                f"{out.url} is not empty, and nothing there is overwritten. Choose another folder"
            )
        for name, text in changed.items():
            out.write_text(os.path.splitext(name)[0] + ".txt", text + "\n")
        return None
    tables: dict[str, dict[str, str]] = {}
    files: dict[str, str] = {}
    for name, text in changed.items():
        file = captions[name].file or os.path.splitext(name)[0] + ".txt"
        if file.endswith(".csv") and file.rpartition("/")[2] == "metadata.csv":
            raise DataError(
                f"{storage.path(file)} is not edited in place: write captions elsewhere with --out"
            )
        if file.endswith(".jsonl"):
            tables.setdefault(file, {})[name] = text
        else:
            files[file] = text + "\n"
    files |= {table: _edited_table(storage, table, texts) for table, texts in tables.items()}
    backup = BACKUPS + time.strftime("%Y%m%d-%H%M%S")
    while storage.exists(backup):
        backup += "-2"
    there = set(storage.list("", True))
    existing = [file for file in files if file in there]
    for file in existing:
        storage.write_bytes(f"{backup}/{file}", storage.read_bytes(file))
    for file, text in files.items():
        storage.write_text(file, text)
    return storage.path(backup) if existing else None


def _edited_table(storage: Storage, table: str, texts: dict[str, str]) -> str:
    place = table.rpartition("/")[0]
    lines = []
    for line in storage.read_text(table).split("\n"):
        entry = json.loads(line) if line.strip() else {}
        file = str(entry.get("file_name", "")).removeprefix("./")
        name = f"{place}/{file}" if place else file
        if name in texts:
            column = next(key for key in CAPTION_COLUMNS if entry.get(key) is not None)
            line = json_text({**entry, column: texts[name]})
        lines.append(line)
    return "\n".join(lines)


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
    there = {_key(tag) for tag in tags}
    first = [tag for tag in edit.prepend if _key(tag) not in there]
    last = [tag for tag in edit.add if _key(tag) not in there]
    tags = [*first, *tags, *last]
    if edit.trigger:
        tags = [edit.trigger, *(tag for tag in tags if _key(tag) != _key(edit.trigger))]
    return [escape_brackets(tag) for tag in tags] if edit.escape else tags


def _key(tag: str) -> str:
    """Return what tags are compared by."""
    return with_spaces(tag.replace("\\(", "(").replace("\\)", ")"))


def _matcher(pattern: str) -> Callable[[str], bool]:
    expression = re.compile(".*".join(re.escape(part) for part in _key(pattern).split("*")), re.DOTALL)
    return lambda tag: expression.fullmatch(_key(tag)) is not None
