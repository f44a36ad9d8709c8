"""What lies in an image folder and is no training image: system folders, runs, searches, class images, other formats.

Folders are recognised by what is in them, not by their names alone: a run by its recipe and figures, class images by
the file that is written beside them.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.storage.object_store import is_address
from dreamfleet.datasets.storage.storage import Storage

log = logging.getLogger(__name__)

CLASS_IMAGES = "class-images.json"  # written into every folder that class images are generated into

# What a recipe names folders for.
CLASS, MASKS, TRAINED_ON, HELD_OUT = "class images", "masks", "training images", "held-out images"

RUN = "a run of dreamfleet"
SEARCH = "a search of dreamfleet"
GENERATED = "class images that dreamfleet generated"
SYSTEM = "a system folder"
NOT_UTF8 = "its name is not UTF-8. Rename it"

# Folders of network storage, operating systems and editors: thumbnails, deleted files and copies.
_SYSTEM_FOLDERS = frozenset(
    (
        "__macosx",
        "@eadir",
        "@tmp",
        "@recycle",
        "@recently-snapshot",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "recycler",
        "recycled",
        "lost+found",
        "system volume information",
        "found.000",
        "__pycache__",
    )
)
_SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"))

_RUN_FILES = frozenset(("metrics.jsonl", "summary.json", "run.log"))
_MARKS = frozenset(("recipe.yaml", "search.yaml", "trials.json", CLASS_IMAGES, *_RUN_FILES))
_CHECKPOINT = re.compile(r"(?:(.*)/)?checkpoints/step-\d+/manifest\.json")
_SAMPLES = re.compile(r"(?:(.*)/)?samples/(?:step-\d+\.(?:png|jsonl)|real\.png)")
_OLD_CLASS_IMAGES = re.compile(r"(?:(.*)/)?class-images/[^/]+-[0-9a-f]{12}/\d{6}\.png")


class Skipped(NamedTuple):
    """Files that are passed over, and need no mending: their place (an address), why, and how many they are."""

    place: str
    reason: str
    files: int


class BadFile(NamedTuple):
    """A file that should be an image of the set, or belong to one, and cannot be used."""

    uri: str
    reason: str


class Folders:
    """Says of each folder below an image folder why nothing in it is trained on; "" for those that are.

    ``apart`` are folders that the recipe names for something else, by their place in this one.
    """

    def __init__(self, names: Iterable[str], apart: Mapping[str, str]):
        self._marks = _marks(names)
        self._apart = dict(apart)
        self._known: dict[str, tuple[str, str]] = {"": ("", "")}

    def why(self, folder: str) -> tuple[str, str]:
        """Return the outermost folder that is left out, and the reason; ("", "") for one that is trained on."""
        known = self._known.get(folder)
        if known is None:
            parent, _, last = folder.rpartition("/")
            known = self.why(parent)
            if not known[1] and (reason := self._reason(folder, last)):
                known = folder, reason
            self._known[folder] = known
        return known

    @property
    def of_root(self) -> str:
        """What the image folder itself is, where it is a run or a search; else ""."""
        return _made_by(self._marks.get("", set())).replace(GENERATED, "")

    def _reason(self, folder: str, last: str) -> str:
        if folder in self._apart:
            return self._apart[folder]
        if is_system_folder(last):
            return SYSTEM
        if not is_utf8(last):
            return NOT_UTF8
        return _made_by(self._marks.get(folder, set()))


def is_system_folder(name: str) -> bool:
    """Say whether a folder is a hidden one, or one that a system keeps for itself."""
    return name.startswith(".") or name.casefold() in _SYSTEM_FOLDERS


def is_system_file(name: str) -> bool:
    """Say whether a file is a hidden one, such as macOS's `._a.png`, or one that a system keeps for itself."""
    return name.startswith(".") or name.casefold() in _SYSTEM_FILES


def is_hidden(name: str) -> bool:
    """Say whether a file, by its name below a folder, is hidden or in a folder that a system keeps."""
    *folders, file = name.split("/")
    return is_system_file(file) or any(map(is_system_folder, folders))


def is_utf8(name: str) -> bool:
    """Say whether a file name, as the operating system gave it, is text."""
    if name.isascii():
        return True
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    r"""Write a file name so that it can be printed and read: bytes that are no UTF-8 become `\xe9`."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def inside_of(folder: Storage, apart: Mapping[str, str]) -> dict[str, str]:
    """Return the folders of ``apart`` (address -> what it holds) that lie in a folder, by their place in it.

    Raises DataError where one is the folder itself, but for held-out images: a warning does there.
    """
    found = {}
    for address, what in apart.items():
        if not is_address(address):
            continue  # of another source, never inside a folder
        place = relative_to(folder, Storage(address))
        if place == "" and what == TRAINED_ON:
            continue
        if place == "" and what == HELD_OUT:
            log.warning(
                "%s is trained on and held out: what is measured on it says nothing of new images", address
            )
            continue
        if place == "":
            raise DataError(
                f"{folder.url} is named twice: as a folder of training images and as {what}. Give each a folder of its "
                "own (one inside the other is fine)"
            )
        if place is not None:
            found[place] = what
    return found


def relative_to(folder: Storage, other: Storage) -> str | None:
    """Return where ``other`` lies in ``folder``, "" where it is the same; None where it lies elsewhere. Links count."""
    pairs = [(folder.url, other.url)]
    if folder.is_local and other.is_local:
        pairs.append((os.path.realpath(folder.url), os.path.realpath(other.url)))
    for root, place in pairs:
        if f"{place}/".startswith(f"{root.rstrip('/')}/"):
            return place[len(root.rstrip("/")) :].strip("/")
    return None


def summary(skipped: Sequence[Skipped], most: int = 5) -> str:
    """Write in one line what was passed over: `cats/runs/one (a run of dreamfleet, 3 files), ...`."""
    told = [
        f"{item.place} ({item.reason}, {item.files} {'file' if item.files == 1 else 'files'})"
        for item in skipped[:most]
    ]
    return ", ".join(told) + (f", and {len(skipped) - most} more" if len(skipped) > most else "")


def _made_by(marks: set[str]) -> str:
    if "search.yaml" in marks and "trials.json" in marks:
        return SEARCH
    if "recipe.yaml" in marks and marks & {*_RUN_FILES, "checkpoints", "samples"}:
        return RUN
    return GENERATED if CLASS_IMAGES in marks else ""


def _marks(names: Iterable[str]) -> dict[str, set[str]]:
    """Collect what tells a folder's maker, by folder."""
    found: dict[str, set[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        if file in _MARKS:
            found.setdefault(folder, set()).add(file)
        elif file == "manifest.json" and (match := _CHECKPOINT.fullmatch(name)):
            found.setdefault(match[1] or "", set()).add("checkpoints")
        elif folder.endswith("samples") and (match := _SAMPLES.fullmatch(name)):
            found.setdefault(match[1] or "", set()).add("samples")
        elif _OLD_CLASS_IMAGES.fullmatch(name):
            found.setdefault(folder, set()).add(CLASS_IMAGES)
    return found
