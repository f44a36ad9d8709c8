"""The settings of another trainer as a flat table, and the documents that they are read from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dreamfleet.trainers.imports.rules import UNSET, is_off


@dataclass(frozen=True)
class Document:
    """A file that was parsed: its address, ``kind`` (json, toml, yaml or command), and its content.

    ``content`` is a tree of mappings and lists; of a command line it is a mapping of options without dashes, and
    ``script`` is the name of the program's script, without folder and suffix. ``role`` is the key that named the file,
    "" for one that was given.
    """

    path: str
    kind: str
    content: Any
    script: str = ""
    role: str = ""

    @property
    def keys(self) -> list[str]:
        """The keys of the content, nested ones joined by dots, with ``*`` for positions in lists."""
        return list(dict.fromkeys(general(where) for where, _ in flatten(self.content)))


@dataclass(frozen=True)
class Setting:
    """One value with the place where it was found, such as ``datasets.0.resolution``."""

    where: str
    value: Any


@dataclass
class Settings:
    """Settings by general key (``datasets.*.resolution``), each with one value or, in lists, several."""

    found: dict[str, list[Setting]] = field(default_factory=dict)

    @classmethod
    def of(cls, tree: Any) -> Settings:
        """Return the settings in a tree of mappings and lists."""
        settings = cls()
        for where, value in flatten(tree):
            settings.found.setdefault(general(where), []).append(Setting(where, value))
        return settings

    def has(self, key: str) -> bool:
        """Return whether a key has a value that is not empty."""
        return any(not is_off(setting.value, UNSET) for setting in self.found.get(key, ()))

    def get(self, key: str, default: Any = None) -> Any:
        """Return the first value of a key that is not empty, else ``default``."""
        return next(
            (item.value for item in self.found.get(key, ()) if not is_off(item.value, UNSET)), default
        )

    def at(self, where: str, default: Any = None) -> Any:
        """Return the value at one place, such as ``datasets.0.resolution``, else ``default``."""
        items = self.found.get(general(where), ())
        return next((item.value for item in items if item.where == where), default)

    def below(self, place: str) -> Callable[..., Any]:
        """Return :meth:`at` for names below a place, such as ``datasets.0``."""
        return lambda name, default=None: self.at(f"{place}.{name}", default)

    def add(self, key: str, value: Any) -> None:
        """Add a value of a key."""
        self.found.setdefault(general(key), []).append(Setting(key, value))

    def merge(self, other: Settings) -> None:
        """Add the settings of another document."""
        for key, items in other.found.items():
            self.found.setdefault(key, []).extend(items)

    def items(self) -> Iterator[tuple[str, list[Setting]]]:
        """Yield every key with its values."""
        yield from self.found.items()


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and value of every leaf; lists of mappings are entered, other lists are values."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        for number, value in enumerate(tree):
            yield from flatten(value, f"{prefix}.{number}" if prefix else str(number))
    elif prefix:
        yield prefix, tree


def general(where: str) -> str:
    """Return a path with ``*`` in place of positions in lists."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", where)
