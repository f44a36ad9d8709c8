"""Marks recipe fields that are paths, and lists, resolves and replaces the paths in a section."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from pydantic.fields import FieldInfo

from dreamfleet.datasets.config_base import Section

MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class PathField:
    """Marks a section's field as a path or URL: ``labels: Annotated[str | None, PathField("file")] = None``.

    The recipe then resolves the path, checks that it exists, requires it on every machine of a cluster, compares its
    content between ranks, and includes it in the package of a submitted job.
    """

    kind: Literal["file", "folder", "images", "model"]
    #: values that are names of built-in items instead of paths
    names: Collection[str] = ()
    #: the value may also be a name on the Hugging Face hub; a relative value is a path if it exists or starts like one
    hub: bool = False
    #: whether it must exist before the workers start; false if the run creates it or it is checked when it is read
    must_exist: bool = True
    #: whether its content must be equal on all ranks; false for image folders, whose indexes are compared instead
    compared: bool = True
    #: whether each machine has its own, such as a local scratch disk
    per_machine: bool = False
    #: whether it contains initial parameters, which are not read once the run has a checkpoint
    is_start: bool = False
    #: whether the run writes it
    is_output: bool = False

    def resolve(self, value: str, folder: str) -> str:
        """Return ``value`` as an absolute path, resolved against ``folder`` on disk or in a bucket; keep names."""
        if value in self.names:
            return value
        path = absolute_path(value, folder)
        is_explicit = value.startswith((".", "~", "/")) or value.endswith(MODEL_SUFFIXES)
        return value if self.hub and not is_explicit and not os.path.exists(path) else path


class NamedPath(NamedTuple):
    """A path in a section: its key, such as ``data.class_data_dir``, its value, and the marker of its field."""

    key: str
    path: str
    field: PathField


def map_paths(section: S, change: Callable[[NamedPath], str], *, prefix: str = "") -> S:
    """Return a copy of a section, including nested sections, with ``change`` applied to every path."""
    values = {name: getattr(section, name) for name in type(section).model_fields}
    changed = {
        name: _map_value(values[name], path_marker(field), change, prefix + name)
        for name, field in type(section).model_fields.items()
    }
    return section.model_copy(update={name: new for name, new in changed.items() if new != values[name]})


def list_paths(section: Section, *, prefix: str = "") -> list[NamedPath]:
    """Return the absolute paths and URLs in a section and its nested sections, in the order of the fields."""
    found = []

    def keep(named: NamedPath) -> str:
        if os.path.isabs(named.path) or "://" in named.path:
            found.append(named)
        return named.path

    map_paths(section, keep, prefix=prefix)
    return found


def resolve_paths(section: S, folder: str) -> S:
    """Return a copy of a section with its relative paths resolved against ``folder``, on disk or in a bucket."""
    return map_paths(section, lambda named: named.field.resolve(named.path, folder))


def by_key(paths: Iterable[NamedPath]) -> dict[str, list[str]]:
    """Return the values of paths by key."""
    found: dict[str, list[str]] = {}
    for named in paths:
        found.setdefault(named.key, []).append(named.path)
    return found


def path_marker(field: FieldInfo) -> PathField | None:
    """Return the marker of a field, None without one; it may be nested, as in ``Annotated[str, ...] | None``."""
    return next(
        (item for item in (*field.metadata, *_metadata(field.annotation)) if isinstance(item, PathField)),
        None,
    )


def absolute_path(path: str, folder: str) -> str:
    """Return a path resolved against ``folder``, on disk or in a bucket; URLs and absolute paths are normalised."""
    path = os.path.expanduser(path)
    if "://" in path or os.path.isabs(path):
        return path if "://" in path else os.path.normpath(path)
    scheme, separator, rest = folder.rpartition("://")
    return f"{scheme}{separator}{os.path.normpath(os.path.join(rest, path))}"


def is_under(path: str, folders: Iterable[str]) -> bool:
    """Return whether a path is one of the folders or inside one."""
    roots = [os.path.abspath(os.path.expanduser(folder)).rstrip("/") for folder in folders]
    return any(path == root or path.startswith(f"{root}/") for root in roots)


def _map_value(value: Any, field: PathField | None, change: Callable[[NamedPath], str], key: str) -> Any:
    if isinstance(value, Section):
        return map_paths(value, change, prefix=f"{key}.")
    if isinstance(value, list | tuple):
        return type(value)(_map_value(inner, field, change, key) for inner in value)
    if isinstance(value, dict):
        return {name: _map_value(inner, field, change, f"{key}.{name}") for name, inner in value.items()}
    return change(NamedPath(key, value, field)) if field and value and isinstance(value, str) else value


def _metadata(annotation: Any) -> Iterator[Any]:
    yield from getattr(annotation, "__metadata__", ())
    for inner in get_args(annotation):
        yield from _metadata(inner)
