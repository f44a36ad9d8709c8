"""State of the labelling page for a folder of images: the current image, the labels, and their JSON file.

Keys and file format are those of DreamArtist (pixivAI's `labeler.py`): a digit is the class, `a` goes back, `d` skips.
"""

from __future__ import annotations

import io
import os
import threading
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from dreamfleet.datasets.errors import DataError, StorageError, UserError
from dreamfleet.datasets.images.images import open_image
from dreamfleet.datasets.index.file_pairing import Pairs
from dreamfleet.datasets.index.image_folder import ImageFolder
from dreamfleet.datasets.index.labels import read_labels, write_labels
from dreamfleet.datasets.storage.storage import Storage

LONGEST_SIDE = 1600  # pixels; larger images are scaled down for the page
ACTIONS = ("show", "label", "back", "skip", "undo", "open")


class Labelling:
    """The images of a folder and their classes; each label is written to the JSON file before it is confirmed.

    ``back``: whether the page above this one is that of ``data browse``. Raises DataError for a folder without images
    and for a JSON file of another kind, which is not modified.
    """

    def __init__(self, folder: str, out: str, classes: Sequence[str], *, back: bool = False):
        storage = Storage(folder)
        if not storage.is_local or not os.path.isdir(storage.url):
            raise DataError(
                f"{folder}: not a folder of this machine. Copy the images to this machine to label them"
            )
        self._back = '<a href="../">All images</a>' if back else ""
        self.root, self.out = storage.url, os.path.abspath(os.path.expanduser(out))
        files = ImageFolder(storage)
        self.names = files.images
        if not self.names:
            raise DataError(
                f"{folder} has no images. Add some (.png, .jpg, .webp ...), or name another folder"
            )
        self.labels = _on_disk(read_labels(self.out), files.pairs) if os.path.exists(self.out) else {}
        most = max([len(classes) - 1, *self.labels.values()])
        self.classes = [*classes, *(f"class {number}" for number in range(len(classes), most + 1))]
        self.unreadable: dict[str, str] = {}
        self._done: list[
            tuple[int, int | None]
        ] = []  # for undo: position of the image, and its previous class
        self._stamp, self._lock = self._file_state(), threading.RLock()
        self.image = lru_cache(maxsize=8)(self._render)

    def act(self, action: str, at: int | None, number: int | None) -> dict[str, Any]:
        """Apply the action of a key or button to the image at position ``at``; return the next state of the page.

        Raises UserError for an invalid action, StorageError when the label cannot be written.
        """
        with self._lock:
            if action not in ACTIONS:
                raise UserError(f"no such action: {action!r}")
            place = self._open(0) if at is None else at
            if not 0 <= place <= len(self.names):
                raise UserError(f"no image at position {place}")
            if action == "label":
                place = self._answer(place, number)
            elif action == "undo" and self._done:
                place, before = self._done[-1]
                self._write(place, before)
                self._done.pop()
            elif action == "open":
                place = self._open(place + 1)
            elif action in ("back", "skip"):
                place = min(place + 1, len(self.names)) if action == "skip" else place - 1
            return self._view(self._readable(place, -1 if action == "back" else 1))

    def html(self, nonce: str) -> str:
        """Return the page."""
        page = Path(__file__).with_name("label.html").read_text("utf-8")
        return page.replace("NONCE", nonce).replace("<!--BACK-->", self._back)

    def answer(self, request: Any) -> dict[str, Any]:
        """Apply a request of the page's script, ``{action, at, class}``; see :meth:`act`."""
        action, at, number = request["action"], request.get("at"), request.get("class")
        if not all(value is None or type(value) is int for value in (at, number)):
            raise ValueError(f"{at!r}, {number!r}")
        return self.act(action, at, number)

    def find_image(self, name: str) -> tuple[bytes, str] | None:
        """Return the image at the position that ``name`` states in decimal digits."""
        if not (name.isascii() and name.isdigit() and len(name) < 10) or int(name) >= len(self.names):
            return None
        return self.image(int(name))

    def report(self) -> dict[str, Any]:
        """Return the file, the number of images of each class, and the images that cannot be read."""
        own = [self.labels[name] for name in self.names if name in self.labels]
        counts = Counter(own)
        return {
            "labels": self.out,
            "pictures": len(self.names),
            "labelled": len(own),
            "classes": {name: counts[number] for number, name in enumerate(self.classes)},
            "unreadable": dict(self.unreadable),
        }

    def _render(self, place: int) -> tuple[bytes, str]:
        """Return an image as the page shows it (upright, scaled down if large) and its media type."""
        name = self.names[place]
        path = os.path.join(self.root, name)
        image = open_image(Storage(self.root).read_bytes(name), uri=path)
        small = max(image.size) <= 512
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        stream = io.BytesIO()
        image.save(stream, "PNG" if small else "JPEG", **({} if small else {"quality": 92}))
        return stream.getvalue(), "image/png" if small else "image/jpeg"

    def _answer(self, place: int, number: int | None) -> int:
        if number is None or not 0 <= number < len(self.classes) or place == len(self.names):
            raise UserError(f"no such class: {number}")
        before = self.labels.get(self.names[place])
        self._write(place, number)
        self._done.append((place, before))
        return place + 1

    def _write(self, place: int, number: int | None) -> None:
        if self._file_state() != self._stamp:
            raise UserError(
                f"{self.out} was changed by another program, and does not contain this label. Restart this "
                "command: it continues from the file"
            )
        changed = {name: label for name, label in self.labels.items() if name != self.names[place]}
        if number is not None:
            changed[self.names[place]] = number
        write_labels(self.out, changed)
        self.labels, self._stamp = changed, self._file_state()

    def _file_state(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.out)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"{self.out}: cannot be read ({error.strerror})") from error
        return found.st_mtime_ns, found.st_size

    def _open(self, start: int) -> int:
        """Return the position of the next image without a class, searching cyclically; the end if there is none."""
        count = len(self.names)
        for step in range(count):
            place = (start + step) % count
            name = self.names[place]
            if name not in self.labels and name not in self.unreadable:
                return place
        return count

    def _readable(self, place: int, direction: int) -> int:
        """Return the first position from ``place`` whose image can be read; record those that cannot."""
        while 0 <= place < len(self.names):
            try:
                self.image(place)
                return place
            except (DataError, StorageError) as error:
                self.unreadable[self.names[place]] = str(error)
                place += direction
        return self._readable(0, 1) if place < 0 else place

    def _view(self, place: int) -> dict[str, Any]:
        report, ended = self.report(), place == len(self.names)
        name = None if ended else self.names[place]
        return {
            "at": place,
            "name": name,
            "label": None if name is None else self.labels.get(name),
            "images": report["pictures"],
            "total": report["pictures"] - len(self.unreadable),
            "labelled": report["labelled"],
            "classes": self.classes,
            "counts": list(report["classes"].values()),
            "unreadable": list(self.unreadable),
            "can_back": place > 0,
            "can_undo": bool(self._done),
        }


def _on_disk(labels: dict[str, int], pairs: Pairs) -> dict[str, int]:
    """Return the labels by the file names on this disk, whose Unicode form may differ from that in the labels."""
    return {next(iter(pairs.named(name)), name): label for name, label in labels.items()}
