"""The full keys of a recipe, such as ``train.max_train_steps``, with their other names, for tables of values."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from dreamfleet.datasets.path_field import PathField, path_marker
from dreamfleet.trainers.config.validation_errors import keys_at, nearest


@dataclass(frozen=True)
class RecipeKey:
    """One value of a recipe: its full key, whether it is text (`007` is then no number), and its path marker."""

    path: str
    is_text: bool
    path_field: PathField | None = None


def recipe_keys(root: type[BaseModel], sections: Mapping[str, type[BaseModel]]) -> dict[str, RecipeKey]:
    """Return the values of a recipe by their full keys and by those with other names of the last part.

    ``sections``: models of sections that depend on a value, such as that of the method.
    """
    return dict(_walk(root, sections, ""))


def find_key(name: str, keys: Mapping[str, RecipeKey]) -> RecipeKey | str:
    """Return the value called ``name``, else the end of a message: which key is meant or similar."""
    if name in keys:
        return keys[name]
    homes = sorted({key.path for known, key in keys.items() if known.rpartition(".")[2] == name})
    return f"; write {' or '.join(homes)}" if homes else nearest(name, keys)


def _walk(
    model: type[BaseModel], sections: Mapping[str, type[BaseModel]], prefix: str
) -> Iterator[tuple[str, RecipeKey]]:
    names = keys_at(model, ())
    for field_name, field in model.model_fields.items():
        path = prefix + field_name
        section = sections.get(path) or field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from _walk(section, sections, f"{path}.")
        else:
            key = RecipeKey(path, _is_text(field.annotation), path_marker(field))
            yield from ((prefix + name, key) for name in names[field_name])


def _is_text(annotation: Any) -> bool:
    """Return whether all values of a field but None are text."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _is_text(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is typing.Literal:
        return all(isinstance(value, str) for value in typing.get_args(annotation))
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return all(_is_text(inner) for inner in typing.get_args(annotation) if inner is not type(None))
    return annotation is str
