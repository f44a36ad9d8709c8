"""Labels, a class for each picture: in a JSON `{file name: class}`, or by folders called 0, 1, 2 ...

Both are DreamArtist's forms for its discriminator's pictures (pixivAI's `labeler.py` and `labeler_folder.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from dreamfleet.datasets.config import MOST_CLASSES
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index.file_pairing import same_name
from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.rng import key
from dreamfleet.datasets.storage.object_store import is_address
from dreamfleet.datasets.storage.storage import Storage, read_text

LABELS_FILE = "dataset.json"  # in the folder of pictures, where nothing else is said
HELD_OUT_SHARE = 5  # at most every so many-th picture of a class is held out


def read_labels(uri: str) -> dict[str, int]:
    """Read a JSON of labels, on disk or in a bucket. Raises DataError, naming it, for anything else."""
    try:
        return parse_labels(read_text(uri), uri)
    except StorageError as error:
        raise DataError(f"labels: {error}") from error


def parse_labels(text: str, uri: str) -> dict[str, int]:
    """Check the text of a JSON of labels; see :func:`read_labels`."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"{uri}: not whole JSON ({error}). Mend it, or name another file") from error
    if not isinstance(found, dict):
        raise DataError(
            f"{uri}: no labels; they are an object {{file name: class number}}. Name another file"
        )
    for name, number in found.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < MOST_CLASSES:
            raise DataError(
                f"{uri}: {name!r} has {json.dumps(number)[:40]} for a class, which is a number from 0; "
                "is this a file of labels? Mend it, or name another"
            )
    return found


def write_labels(path: str, labels: Mapping[str, int]) -> None:
    """Write a JSON of labels on disk, whole or not at all. Raises StorageError when the disk refuses."""
    folder, _, name = path.rpartition("/")
    Storage(folder or "/").write_text(name, json_text(dict(labels), indent=1) + "\n")


def label_of(name: str, labels: Mapping[str, int] | None) -> int | None:
    """Return the class of a picture, by its name relative to its folder; None for one without.

    ``labels`` may name it whole or by its last part. Without labels the innermost folder that is a number counts.
    """
    *folders, last = name.split("/")
    if labels is not None:
        return labels.get(name, labels.get(last))
    numbers = [
        int(part) for part in folders if part.isascii() and part.isdigit() and int(part) < MOST_CLASSES
    ]
    return numbers[-1] if numbers else None


def find_labels(index: Index, folders: Sequence[str], labels: str | None = None) -> dict[int, int]:
    """Return the class of each labelled row of an index over folders (a row's concept is its folder's place).

    ``labels`` names the JSON; without it each folder's own ``dataset.json`` counts, else subfolders 0, 1, ...
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
        name = uri.removeprefix(f"{root.url if root else folders[place]}/")
        label = label_of(same_name(name), tables[place])
        if label is not None:
            found[row] = label
    return found


def _by_name(labels: Mapping[str, int]) -> dict[str, int]:
    """Return labels by what names are compared by: in either Unicode form, with either slash."""
    return {same_name(name.replace("\\", "/")): label for name, label in labels.items()}


def hold_out(index: Index, labels: Mapping[int, int], per_class: int) -> dict[int, int]:
    """Choose pictures of each class to measure with, by a hash of their content: the same in every run.

    At most a fifth of a class. Copies of a picture stay together.
    """
    hashes = index.column("sha256")
    chosen = set()
    for label in set(labels.values()):
        rows = sorted((r for r in labels if labels[r] == label), key=lambda r: key("holdout", hashes[r]))
        chosen |= {hashes[row] for row in rows[: min(per_class, len(rows) // HELD_OUT_SHARE)]}
    return {row: label for row, label in labels.items() if hashes[row] in chosen}
