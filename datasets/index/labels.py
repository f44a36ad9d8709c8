"""Reads and writes class labels of images: a JSON file `{file name: class}`, or subfolders named 0, 1, 2, ...

Both are DreamArtist's formats for the training images of its discriminator (pixivAI's `labeler.py` and
`labeler_folder.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from dreamfleet.datasets.config import MOST_CLASSES
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index.edited_source import original_uri
from dreamfleet.datasets.index.file_pairing import same_name
from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.rng import key
from dreamfleet.datasets.storage.object_store import is_address
from dreamfleet.datasets.storage.storage import Storage, read_text

LABELS_FILE = "dataset.json"  # the default labels file, in the image folder
HELD_OUT_SHARE = 5  # at most 1 / HELD_OUT_SHARE of a class is held out


def read_labels(uri: str) -> dict[str, int]:
    """Read a labels file, on disk or in a bucket. Raises DataError if it cannot be read or is not one."""
    try:
        return parse_labels(read_text(uri), uri)
    except StorageError as error:
        raise DataError(f"labels: {error}") from error


def parse_labels(text: str, uri: str) -> dict[str, int]:
    """Parse and check the text of a labels file; ``uri`` is for error messages. Raises DataError."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"{uri}: not valid JSON ({error}). Correct it, or name another file") from error
    if not isinstance(found, dict):
        raise DataError(
            f"{uri}: not a file of labels, which is an object {{file name: class number}}. Name another file"
        )
    for name, number in found.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < MOST_CLASSES:
            raise DataError(
                f"{uri}: the class of {name!r} is {json.dumps(number)[:40]}, but must be an integer from 0 to "
                f"{MOST_CLASSES - 1}. Correct it, or name another file"
            )
    return found


def write_labels(path: str, labels: Mapping[str, int]) -> None:
    """Write a labels file atomically. Raises StorageError."""
    folder, _, name = path.rpartition("/")
    Storage(folder or "/").write_text(name, json_text(dict(labels), indent=1) + "\n")


def label_of(name: str, labels: Mapping[str, int] | None) -> int | None:
    """Return the class of an image, given its path relative to the image folder; None without a label.

    ``labels`` may contain the path or the file name. If ``labels`` is None, the class is the name of the innermost
    folder whose name is a number.
    """
    *folders, last = name.split("/")
    if labels is not None:
        return labels.get(name, labels.get(last))
    numbers = [
        int(part) for part in folders if part.isascii() and part.isdigit() and int(part) < MOST_CLASSES
    ]
    return numbers[-1] if numbers else None


def find_labels(index: Index, folders: Sequence[str], labels: str | None = None) -> dict[int, int]:
    """Return row number -> class for the labelled rows of an index; ``folders[i]`` is the folder of concept i.

    ``labels`` is the address of the labels file. Without it each folder's ``dataset.json`` is used, or, if it has none,
    its subfolders 0, 1, ...
    """
    roots = [Storage(folder) if is_address(folder) else None for folder in folders]
    if labels is not None:
        tables: list[dict[str, int] | None] = [_by_name(read_labels(labels))] * len(folders)
    else:
        tables = [
            _by_name(read_labels(root.path(LABELS_FILE))) if root and root.exists(LABELS_FILE) else None
            for root in roots
        ]
    found = {}
    for row, (uri, place) in enumerate(zip(index.column("uri"), index.column("concept"), strict=True)):
        root = roots[place]
        name = original_uri(uri).removeprefix(f"{root.url if root else folders[place]}/")
        label = label_of(same_name(name), tables[place])
        if label is not None:
            found[row] = label
    return found


def _by_name(labels: Mapping[str, int]) -> dict[str, int]:
    """Return the labels with their names normalised for comparison, with forward slashes."""
    return {same_name(name.replace("\\", "/")): label for name, label in labels.items()}


def hold_out(index: Index, labels: Mapping[int, int], per_class: int) -> dict[int, int]:
    """Return the labels of held-out rows: up to ``per_class`` images of each class, chosen by a hash of their content.

    The choice is therefore the same in every run. At most a fifth of a class is held out, and all copies of an image
    together.
    """
    hashes = index.column("sha256")
    chosen = set()
    for label in set(labels.values()):
        rows = sorted((r for r in labels if labels[r] == label), key=lambda r: key("holdout", hashes[r]))
        chosen |= {hashes[row] for row in rows[: min(per_class, len(rows) // HELD_OUT_SHARE)]}
    return {row: label for row, label in labels.items() if hashes[row] in chosen}
