"""Recipe fields that are paths: a marker in a field's type, and one walker that lists and replaces the paths."""

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
    #: values that name something built in
    names: Collection[str] = ()
    #: may also be a name on the Hugging Face hub: a relative path counts as one only if it exists or is written as one
    hub: bool = False
    #: must exist before the workers start; false: created by the run, or checked where it is read
    must_exist: bool = True
    #: must have the same content on all ranks; false for image folders, whose indexed files are compared instead
    compared: bool = True
    #: each machine has its own, such as a local scratch disk
    per_machine: bool = False
    #: where the parameters start; not read once the run has a checkpoint
    is_start: bool = False
    #: written by the run
    is_output: bool = False

    def resolve(self, value: str, folder: str) -> str:
        """Return the absolute path of ``value``, relative to ``folder`` on disk or in a bucket; names stay."""
        if value in self.names:
            return value
        path = absolute_path(value, folder)
        is_explicit = value.startswith((".", "~", "/")) or value.endswith(MODEL_SUFFIXES)
        return value if self.hub and not is_explicit and not os.path.exists(path) else path


class NamedPath(NamedTuple):
    """A path in a section: its key, such as ``data.class_data_dir``, its value, and its field's marker."""

    key: str
    path: str
    field: PathField


def map_paths(section: S, change: Callable[[NamedPath], str], *, prefix: str = "") -> S:
    """Return a copy of a section, and of the sections in it, with every value of a path field changed."""
    values = {name: getattr(section, name) for name in type(section).model_fields}
    changed = {
        name: _map_value(values[name], path_marker(field), change, prefix + name)
        for name, field in type(section).model_fields.items()
    }
    return section.model_copy(update={name: new for name, new in changed.items() if new != values[name]})


def list_paths(section: Section, *, prefix: str = "") -> list[NamedPath]:
    """Return the absolute paths and URLs in a section and in the sections inside it, in the order of the fields."""
    found = []

    def keep(named: NamedPath) -> str:
        if os.path.isabs(named.path) or "://" in named.path:
            found.append(named)
        return named.path

    map_paths(section, keep, prefix=prefix)
    return found


def resolve_paths(section: S, folder: str) -> S:
    """Return a copy of a section whose relative paths start at ``folder``, on disk or in a bucket."""
    return map_paths(section, lambda named: named.field.resolve(named.path, folder))


def by_key(paths: Iterable[NamedPath]) -> dict[str, list[str]]:
    """Return the paths of each key."""
    found: dict[str, list[str]] = {}
    for named in paths:
        found.setdefault(named.key, []).append(named.path)
    return found


def path_marker(field: FieldInfo) -> PathField | None:
    """Return the marker of a field, anywhere in its type: ``Annotated[str, ...] | None`` has it inside."""
    return next(
        (item for item in (*field.metadata, *_metadata(field.annotation)) if isinstance(item, PathField)),
        None,
    )


def absolute_path(path: str, folder: str) -> str:
    """Return a path that starts at ``folder``, on disk or in a bucket; URLs and absolute paths are only normalised."""
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
