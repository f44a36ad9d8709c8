"""Recognises what to skip in an image folder: system files, runs, searches, generated class images, named folders.

Runs, searches and class images are recognised by their content, not by the folder's name: a run by its recipe and
metrics, class images by the file ``class-images.json`` beside them.
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

CLASS_IMAGES = "class-images.json"  # present in every folder of generated class images

# Purposes for which a recipe can name a folder.
CLASS, MASKS, TRAINED_ON, HELD_OUT = "class images", "masks", "training images", "held-out images"

RUN = "a run of dreamfleet"
SEARCH = "a search of dreamfleet"
GENERATED = "class images that dreamfleet generated"
SYSTEM = "a system folder"
NOT_UTF8 = "its name is not UTF-8. Rename it"

# Folders that network storage, operating systems and editors create for thumbnails, deleted files and copies.
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
_CHECKPOINT = re.compile(r"(?:(.*)/)?checkpoints/step-\d+/manifest(?:\.attempt-\d+)?\.json")
_SAMPLES = re.compile(r"(?:(.*)/)?samples/(?:step-\d+\.(?:png|jsonl)|real\.png)")
_OLD_CLASS_IMAGES = re.compile(r"(?:(.*)/)?class-images/[^/]+-[0-9a-f]{12}/\d{6}\.png")


class Skipped(NamedTuple):
    """Files that are deliberately skipped: the address of their folder, the reason, and the number of files."""

    place: str
    reason: str
    files: int


class BadFile(NamedTuple):
    """A file that should be an image or belong to one but cannot be used, and the reason."""

    uri: str
    reason: str


class Folders:
    """Decides which subfolders of an image folder are skipped, and why.

    ``excluded`` maps relative paths of subfolders that the recipe names for another purpose to that purpose.
    """

    def __init__(self, names: Iterable[str], excluded: Mapping[str, str]):
        self._marks = _marks(names)
        self._excluded = dict(excluded)
        self._known: dict[str, tuple[str, str]] = {"": ("", "")}

    def why(self, folder: str) -> tuple[str, str]:
        """Return the outermost skipped folder that is or contains ``folder``, and the reason; ("", "") if none."""
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
        """Description of the image folder itself if it is a run or a search, otherwise ""."""
        return _kind_of(self._marks.get("", set())).replace(GENERATED, "")

    def _reason(self, folder: str, last: str) -> str:
        if folder in self._excluded:
            return self._excluded[folder]
        if is_system_folder(last):
            return SYSTEM
        if not is_utf8(last):
            return NOT_UTF8
        return _kind_of(self._marks.get(folder, set()))


def is_system_folder(name: str) -> bool:
    """Return whether a folder is hidden or was created by an operating system or a storage system."""
    return name.startswith(".") or name.casefold() in _SYSTEM_FOLDERS


def is_system_file(name: str) -> bool:
    """Return whether a file is hidden, such as macOS's `._a.png`, or was created by an operating system."""
    return name.startswith(".") or name.casefold() in _SYSTEM_FILES


def is_hidden(name: str) -> bool:
    """Return whether the file at a relative path is hidden, or is in a hidden or system folder."""
    *folders, file = name.split("/")
    return is_system_file(file) or any(map(is_system_folder, folders))


def is_utf8(name: str) -> bool:
    """Return whether a file name, as returned by the operating system, is valid UTF-8."""
    if name.isascii():
        return True
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    r"""Return a printable form of a file name, with bytes that are not UTF-8 escaped as in `\xe9`."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def folders_inside(folder: Storage, excluded: Mapping[str, str]) -> dict[str, str]:
    """Return the entries of ``excluded`` (address -> purpose) inside a folder, as relative path -> purpose.

    Raises DataError if one is the folder itself, except that held-out images only log a warning.
    """
    found = {}
    for address, what in excluded.items():
        if not is_address(address):
            continue  # a URL of another source, which is never inside a folder
        place = relative_to(folder, Storage(address))
        if place == "" and what == TRAINED_ON:
            continue
        if place == "" and what == HELD_OUT:
            log.warning(
                "%s is both trained on and held out: its scores do not measure how the model generalises",
                address,
            )
            continue
        if place == "":
            raise DataError(
                f"{folder.url} is named twice: for training images and for {what}. Use separate folders (one may be "
                "within the other)"
            )
        if place is not None:
            found[place] = what
    return found


def relative_to(folder: Storage, other: Storage) -> str | None:
    """Return the path of ``other`` relative to ``folder``, "" if they are the same, None if it is outside.

    Symbolic links are resolved.
    """
    pairs = [(folder.url, other.url)]
    if folder.is_local and other.is_local:
        pairs.append((os.path.realpath(folder.url), os.path.realpath(other.url)))
    for root, place in pairs:
        if f"{place}/".startswith(f"{root.rstrip('/')}/"):
            return place[len(root.rstrip("/")) :].strip("/")
    return None


def summary(skipped: Sequence[Skipped], most: int = 5) -> str:
    """Return a one-line summary of skipped files: `cats/runs/one (a run of dreamfleet, 3 files), ...`."""
    parts = [
        f"{item.place} ({item.reason}, {item.files} {'file' if item.files == 1 else 'files'})"
        for item in skipped[:most]
    ]
    return ", ".join(parts) + (f", and {len(skipped) - most} more" if len(skipped) > most else "")


def _kind_of(marks: set[str]) -> str:
    if "search.yaml" in marks and "trials.json" in marks:
        return SEARCH
    if "recipe.yaml" in marks and marks & {*_RUN_FILES, "checkpoints", "samples"}:
        return RUN
    return GENERATED if CLASS_IMAGES in marks else ""


def _marks(names: Iterable[str]) -> dict[str, set[str]]:
    """Return folder -> names of the marker files and folders that identify its kind."""
    found: dict[str, set[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        if file in _MARKS:
            found.setdefault(folder, set()).add(file)
        elif file.startswith("manifest.") and (match := _CHECKPOINT.fullmatch(name)):
            found.setdefault(match[1] or "", set()).add("checkpoints")
        elif folder.endswith("samples") and (match := _SAMPLES.fullmatch(name)):
            found.setdefault(match[1] or "", set()).add("samples")
        elif _OLD_CLASS_IMAGES.fullmatch(name):
            found.setdefault(folder, set()).add(CLASS_IMAGES)
    return found
