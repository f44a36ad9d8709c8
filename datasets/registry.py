"""A registry of named implementations of an interface: built-in ones, and ones that installed packages add."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from dreamfleet.datasets.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """The implementations of one interface by name; each is imported at its first use.

    ``kind`` is the noun for an entry in errors ("method"). ``builtin`` maps names to ``"module:attribute"``. ``group``
    is the group of Python entry points through which installed packages add entries, such as ``dreamfleet.methods``;
    :meth:`register` adds an entry in this process. Duplicate names are rejected. ``find_problem(name, entry)`` returns
    a description of what an external entry lacks, None if it is complete.
    """

    def __init__(
        self,
        kind: str,
        *,
        group: str,
        builtin: Mapping[str, str],
        find_problem: Callable[[str, T], str | None] = lambda name, entry: None,
    ):
        self.kind, self.group, self.find_problem = kind, group, find_problem
        self._paths = dict(builtin)
        self._loaded: dict[str, T] = {}
        self._searched = False

    def names(self) -> list[str]:
        """Return the names of all entries: the built-in ones in order, then the others sorted."""
        self._search()
        return list(self._paths)

    def get(self, name: str) -> T:
        """Return the entry called ``name``. Raises UserError, with the most similar name, if there is none."""
        self._search()
        if name not in self._paths:
            near = difflib.get_close_matches(name, self._paths, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{self.kind} {name!r} does not exist{hint} (known: {', '.join(self._paths)})")
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        self._search()
        return name in self._paths

    def items(self) -> Iterator[tuple[str, T]]:
        """Yield the name and the entry of every implementation, importing each."""
        for name in self.names():
            yield name, self.get(name)

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that adds an entry called ``name`` in this process. Raises ValueError if it is taken."""

        def add(entry: T) -> T:
            path = f"{getattr(entry, '__module__', '')}:{getattr(entry, '__qualname__', name)}"
            if self._paths.get(name, path) != path:
                raise ValueError(f"{self.kind} {name!r} is {self._paths[name]} already")
            self._check(name, entry, path)
            self._paths[name] = path
            self._loaded[name] = entry
            return entry

        return add

    def unregister(self, name: str) -> None:
        """Remove an entry that :meth:`register` added."""
        self._paths.pop(name, None)
        self._loaded.pop(name, None)

    def _search(self) -> None:
        if self._searched:
            return
        for point in sorted(entry_points(group=self.group), key=lambda point: point.name):
            if self._paths.setdefault(point.name, point.value) != point.value:
                raise UserError(
                    f"the installed package {point.dist.name if point.dist else '?'} adds a {self.kind} "
                    f"{point.name!r}, which is {self._paths[point.name]} already; remove or rename one"
                )
        self._searched = True

    def _load(self, name: str) -> T:
        entry: T = load_attribute(self._paths[name], what=f"{self.kind} {name!r}")
        self._check(name, entry, self._paths[name])
        return entry

    def _check(self, name: str, entry: T, path: str) -> None:
        if problem := self.find_problem(name, entry):
            raise UserError(f"{self.kind} {name!r} ({path}): {problem}")


class EntryName:
    """A pydantic validator of names of entries; the recipe reference lists the names in its ``registry``."""

    def __init__(self, registry: Registry[Any], *, loads: bool = True):
        self.registry, self.loads = registry, loads

    def __call__(self, name: str) -> str:
        """Return the name. Raises ValueError if there is no such entry or it cannot be loaded.

        Without ``loads``, entries that exist are not imported, as their modules may need torch.
        """
        try:
            if self.loads or name not in self.registry:
                self.registry.get(name)
        except UserError as error:
            raise ValueError(str(error)) from error
        return name


def load_attribute(path: str, *, what: str) -> Any:
    """Import ``"module:attribute"``. Raises UserError with the reason, calling the attribute ``what``."""
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{what} cannot be loaded from {path}: {error}") from error
