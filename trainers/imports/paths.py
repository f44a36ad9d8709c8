"""Paths in the settings of other trainers: finds them on this machine, maps those of another one."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.path_field import MODEL_SUFFIXES

_WINDOWS = re.compile(r"^[A-Za-z]:[\\/]|^\\\\")
_HUB = re.compile(r"^[\w.\-]+/[\w.\-]+$")


@dataclass
class PathMap:
    """Translates paths; ``missing`` collects those that do not exist on this machine, by their place.

    ``pairs`` are the (old, new) prefixes of ``--map``. ``folders`` are the folders that relative paths may start
    at: those of the imported files, and the current one.
    """

    pairs: Sequence[tuple[str, str]] = ()
    folders: Sequence[str] = ()
    missing: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def image_folder(self, where: str, path: str) -> str:
        """Return a folder or file that must exist, mapped and if possible absolute; note it if it does not exist."""
        return self._find(where, self.mapped(path))

    def model(self, where: str, path: str) -> str:
        """Return a model: a hub name, or a path as :meth:`image_folder`."""
        path = self.mapped(path)
        on_hub = _HUB.match(path) and not path.endswith(MODEL_SUFFIXES) and not path.startswith((".", "~"))
        if "/" not in path and not path.endswith(MODEL_SUFFIXES) and not os.path.exists(path):
            return path  # a name such as pocket
        return path if on_hub and not self._existing(path) else self._find(where, path)

    def output(self, path: str) -> str:
        """Return a path that the run writes, mapped; a path of another system becomes a relative one."""
        path = self.mapped(path)
        return re.sub(r"^[A-Za-z]:", "", path).lstrip("/") if _WINDOWS.match(path) else path

    def mapped(self, path: str) -> str:
        """Return a path with the prefix of ``--map`` replaced, and forward slashes."""
        slashes = _slashes(path.strip())
        for old, new in self.pairs:
            start = _slashes(old).rstrip("/")
            same = slashes.lower() if _WINDOWS.match(old) else slashes
            start_same = start.lower() if _WINDOWS.match(old) else start
            if same == start_same or same.startswith(f"{start_same}/"):
                self.used.add(old)
                return new.rstrip("/") + slashes[len(start) :]
        return slashes

    def _find(self, where: str, path: str) -> str:
        if "://" in path:
            return path
        if found := self._existing(path):
            return found
        self.missing[where] = path
        return path

    def _existing(self, path: str) -> str | None:
        path = os.path.expanduser(path)
        places = [path] if os.path.isabs(path) else [os.path.join(folder, path) for folder in self.folders]
        return next((os.path.abspath(place) for place in places if os.path.exists(place)), None)


def read_pairs(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Return the (old, new) prefixes of ``OLD=NEW`` texts, the longest old prefix first. Raises UserError."""
    pairs = []
    for text in texts:
        old, equals, new = text.partition("=")
        if not equals or not old.strip() or not new.strip():
            raise UserError(f"--map {text!r}: write OLD=NEW, such as --map 'D:\\train=/data/train'")
        pairs.append((old.strip(), new.strip()))
    return sorted(pairs, key=lambda pair: -len(pair[0]))


def _slashes(path: str) -> str:
    is_windows = _WINDOWS.match(path) or ("\\" in path and "/" not in path) or path.startswith(".\\")
    return path.replace("\\", "/") if is_windows else path
