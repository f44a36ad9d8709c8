"""The subjects of a fleet, from the rows of a table: names, images, prompts, priorities and values of recipe keys."""

from __future__ import annotations

import copy
import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.json_text import json_text
from dreamfleet.trainers.config.differences import without_package_path
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.tune.fleet.columns import CLASS_PROMPT, IMAGES, PROMPT

PLACEHOLDER = "images-of-each-subject"
_OTHER_SOURCES = ("data.train_data_dir", "data.concepts_list", "data.sets")
_KEPT_TREES = 64  # plain recipes that are kept for the next subjects with equal values


@dataclass(frozen=True)
class Subject:
    """One subject: its name, the number of its row, its priority, and the values that it changes by recipe key."""

    name: str
    row: int
    priority: float
    values: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """A hash of the values, by which a resumed fleet recognises a changed row."""
        values = {key: without_package_path(self.values[key]) for key in sorted(self.values)}
        text = json_text(values, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Subjects(Sequence[Subject]):
    """The subjects of a table, stored compactly; equal values of recipe keys are stored once."""

    def __init__(
        self,
        *,
        names: Sequence[str],
        rows: Sequence[int],
        priorities: Sequence[float],
        texts: Mapping[str, Sequence[str | None]],
        choices: Sequence[Mapping[str, Any]],
        chosen: Sequence[int],
    ):
        """``texts``: images and prompts by key; ``choices[chosen[i]]``: the other values of subject ``i`` by key."""
        self.names, self.rows = names, rows
        self.priorities = array("d", priorities)
        self._texts, self._choices, self._chosen = texts, choices, array("L", chosen)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        texts = {key: cells[index] for key, cells in self._texts.items() if cells[index] is not None}
        return Subject(
            self.names[index],
            self.rows[index],
            self.priorities[index],
            {**texts, **self._choices[self._chosen[index]]},
        )

    def order(self) -> list[int]:
        """Return the indices of the subjects: higher priorities first, then in the order of the table."""
        return sorted(range(len(self)), key=lambda index: -self.priorities[index])


class SubjectRecipes:
    """Makes the recipes of subjects from that of the fleet; relative paths in values start at ``folder``."""

    def __init__(self, base: Recipe, folder: str):
        self.base, self.folder = base, folder
        self._tree = base.model_dump(mode="json", exclude={"search", "fleet"})
        self._tree["tracking"] = base.tracking.of_group(base.output_dir).model_dump(mode="json")
        self._made: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def tree(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the base recipe with values by key, as a plain mapping that is not validated."""
        tree = copy.deepcopy(self._tree)
        for key in _OTHER_SOURCES if IMAGES in values else ():
            put(tree, key, None)
        for key, value in values.items():
            put(tree, key, value)
        return tree

    def recipe(self, values: Mapping[str, Any]) -> Recipe:
        """Return the validated recipe of a subject. Raises RecipeError if it is invalid."""
        return build_recipe(self.tree(values), source="the subject's recipe", folder=self.folder)

    def task_tree(self, subject: Subject) -> dict[str, Any]:
        """Return the resolved recipe of a subject as a plain mapping, with ``output_dir``."""
        own = {key: value for key, value in subject.values.items() if key in (IMAGES, PROMPT, CLASS_PROMPT)}
        others = {key: value for key, value in subject.values.items() if key not in own}
        name = json_text([dict(sorted(others.items())), sorted(own)], default=str)
        if name not in self._made:
            made = self.recipe({**dict.fromkeys(own, PLACEHOLDER), **others})
            self._made[name] = made.model_dump(mode="json", exclude={"search", "fleet"})
            if len(self._made) > _KEPT_TREES:
                self._made.popitem(last=False)
        tree = {**self._made[name], "output_dir": subject_folder(self.base, subject.name)}
        tree["data"] = {**tree["data"], **{key.partition(".")[2]: value for key, value in own.items()}}
        return tree


def subject_folder(recipe: Recipe, name: str) -> str:
    """Return the run folder of a subject."""
    return f"{recipe.output_dir.rstrip('/')}/subjects/{name}"


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a value of a plain recipe by its full key."""
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = value


class Faults:
    """Collects errors of rows; equal errors of several rows are one line."""

    def __init__(self) -> None:
        self._rows: dict[str, list[int]] = {}
        self._most = 100

    def add(self, message: str, rows: Iterable[int]) -> None:
        """Add an error of rows, given by their numbers."""
        self._rows.setdefault(message, []).extend(rows)

    def add_all(self, messages: Iterable[str], rows: Sequence[int]) -> None:
        """Add errors of the same rows."""
        for message in messages:
            self.add(message, rows)

    def lines(self) -> list[str]:
        """Return one line for each error, in the order of their first rows."""
        found = sorted(self._rows.items(), key=lambda item: item[1][0])
        lines = [f"{_list_rows(rows)}: {message}" for message, rows in found[: self._most]]
        more = len(found) - self._most
        return [*lines, f"and {more} more errors"] if more > 0 else lines


def refuse(source: str, errors: Sequence[str]) -> None:
    """Raise RecipeError that lists errors of a table or a recipe, if there are any."""
    if errors:
        count = f"{len(errors)} error{'s' * (len(errors) > 1)}"
        raise RecipeError(f"{source}: {count}, nothing was started:\n  " + "\n  ".join(errors))


def _list_rows(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
    return f"row{'s' * (len(rows) > 1)} {shown}"
