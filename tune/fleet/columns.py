"""What the columns of a table of subjects mean: the name, the priority, or a key of the recipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from dreamfleet.datasets.path_field import PathField
from dreamfleet.trainers.config.method import METHODS
from dreamfleet.trainers.config.recipe_keys import RecipeKey, find_key, recipe_keys
from dreamfleet.trainers.recipe import Recipe

NAME, PRIORITY = "name", "priority"
IMAGES, PROMPT, CLASS_PROMPT = "data.instance_data_dir", "data.instance_prompt", "data.class_prompt"
# Columns without a section, in lower case, and what they mean.
_SHORT = {
    **dict.fromkeys(("name", "subject", "subject_name", "run_name", "output_name"), NAME),
    **dict.fromkeys(("priority",), PRIORITY),
    **dict.fromkeys(("images", "image_dir", "image_folder", "instance_data_dir", "instance_images"), IMAGES),
    **dict.fromkeys(("prompt", "instance_prompt", "class_tokens", "trigger_word"), PROMPT),
    **dict.fromkeys(("class_prompt",), CLASS_PROMPT),
}
_WHOLE_FLEET = "is the same for the whole fleet; set it in the recipe, or as KEY=VALUE"
_OTHER_IMAGES = "name the images of a subject in the column images"
# Keys, or sections, that a column cannot set, and why.
_REFUSED = {
    "output_dir": "the run folder of a subject is output_dir/subjects/NAME",
    "fleet": _WHOLE_FLEET,
    "search": _WHOLE_FLEET,
    "scaling": _WHOLE_FLEET,
    "storage": _WHOLE_FLEET,
    "data.train_data_dir": _OTHER_IMAGES,
    "data.concepts_list": _OTHER_IMAGES,
    "data.sets": _OTHER_IMAGES,
}


@dataclass(frozen=True)
class Column:
    """A column: its header, and its meaning, :data:`NAME`, :data:`PRIORITY` or a full key of the recipe."""

    header: str
    key: str
    is_text: bool
    path_field: PathField | None = None

    def value(self, cell: Any) -> Any:
        """Return the value of a cell that is not empty. Raises ValueError for text that is not YAML."""
        if not isinstance(cell, str) or self.is_text:
            return cell
        try:
            return json.loads(cell)  # as most cells are: much faster than YAML
        except ValueError:
            pass
        try:
            return yaml.safe_load(cell)
        except yaml.YAMLError as error:
            raise ValueError(f"{cell!r} is not YAML; put it in quotes") from error


def read_columns(headers: Iterable[str], methods: Iterable[str]) -> tuple[list[Column], list[str]]:
    """Return the columns of a table, and all errors. ``methods``: names of the methods that its subjects use."""
    keys: dict[str, RecipeKey] = {}
    for method in methods:
        keys |= recipe_keys(Recipe, {"method": METHODS.get(method)} if method in METHODS else {})
    columns: dict[str, Column] = {}
    errors = []
    for header in headers:
        column = _read_column(header, keys)
        if isinstance(column, str):
            errors.append(column)
        elif column.key in columns:
            errors.append(f"columns {columns[column.key].header!r} and {header!r} mean the same; remove one")
        else:
            columns[column.key] = column
    if NAME not in columns:
        errors.append("no column name: every subject needs one")
    return list(columns.values()), errors


def _read_column(header: str, keys: Mapping[str, RecipeKey]) -> Column | str:
    """Return the column of a header, or the error."""
    name = header.strip()
    if meaning := _SHORT.get(name.lower()):
        return Column(header, meaning, meaning != PRIORITY)
    section = name.partition(".")[0]
    if reason := _REFUSED.get(name) or _REFUSED.get(section):
        return f"column {header!r}: {reason}"
    found = find_key(name, {**{short: RecipeKey(short, False) for short in _SHORT}, **keys})
    if isinstance(found, str):
        return (
            f"column {header!r}: neither name, images, prompt, class_prompt, priority nor a key of the "
            f"recipe{found}"
        )
    if reason := _REFUSED.get(found.path):
        return f"column {header!r}: {reason}"
    return Column(header, found.path, found.is_text, found.path_field)
