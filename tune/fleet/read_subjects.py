"""Reads and checks a table of subjects against a recipe; reports all errors together, with the numbers of the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from dreamfleet.datasets.path_field import is_under
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.tune.fleet.check_values import check_values
from dreamfleet.tune.fleet.columns import (
    CLASS_PROMPT,
    IMAGES,
    NAME,
    PRIORITY,
    PROMPT,
    Column,
    read_columns,
)
from dreamfleet.tune.fleet.image_places import find_faults, paths_in, read_place
from dreamfleet.tune.fleet.names import find_fault, folded
from dreamfleet.tune.fleet.subjects import Faults, SubjectRecipes, Subjects, refuse
from dreamfleet.tune.fleet.table import EMPTY, Table

TEXTS = (IMAGES, PROMPT, CLASS_PROMPT)  # keys whose values usually differ from row to row


def read_subjects(
    table: Table,
    recipe: Recipe,
    *,
    has_images: bool = True,
    looks: bool = True,
    elsewhere: Sequence[str] = (),
) -> tuple[Subjects, SubjectRecipes]:
    """Return the subjects of a table, and what makes their recipes from that of the fleet.

    ``has_images``: whether the recipe names images, which rows without images use. ``looks``: whether to check that
    images and other files exist; images in the folders ``elsewhere`` need not exist on this machine. Raises RecipeError
    that lists all errors of the table.
    """
    faults = Faults()
    recipes = SubjectRecipes(recipe, table.folder)
    columns, errors = read_columns(table.columns, _methods(table, recipe))
    by_key = {column.key: column for column in columns}
    count = len(table.numbers)
    if not count and not table.errors:
        errors.append("no rows: every row is a subject")
    names = _read_names(table, by_key.get(NAME), faults, folds="://" not in recipe.output_dir)
    priorities = _cells(table, by_key.get(PRIORITY), faults, _priority) or [0.0] * count
    readers: dict[str, Callable[[Any], Any]] = {
        IMAGES: lambda cell: read_place(cell, table.folder),
        PROMPT: _text,
        CLASS_PROMPT: _text,
    }
    texts = {
        key: cells
        for key, read in readers.items()
        if (cells := _cells(table, by_key.get(key), faults, read)) is not None
    }
    others = [column for column in columns if column.key not in (NAME, PRIORITY, *TEXTS)]
    choices, chosen = _choose(table, others, faults)
    check_values(recipes, table.numbers, others, texts, choices, chosen, faults, looks=looks)
    if not has_images:
        given = texts.get(IMAGES, [None] * count)
        missing = [number for number, cell in zip(table.numbers, given, strict=True) if cell is None]
        if missing and IMAGES in by_key:
            faults.add("the cell of images is empty, and the recipe names no images", missing)
        elif missing and count:
            errors.append("no column images: neither the table nor the recipe names images")
    if looks and IMAGES in texts:
        _check_images(table, texts[IMAGES], faults, elsewhere)
    refuse(table.path, [*errors, *table.errors, *faults.lines()])
    subjects = Subjects(
        names=names,
        rows=table.numbers,
        priorities=[0.0 if value is None else value for value in priorities],
        texts=texts,
        choices=choices,
        chosen=chosen,
    )
    return subjects, recipes


def _methods(table: Table, recipe: Recipe) -> set[str]:
    named = {cell for cell in table.columns.get("method.name", ()) if isinstance(cell, str)}
    return {recipe.method.name, *named}


def _read_names(table: Table, column: Column | None, faults: Faults, *, folds: bool) -> list[str]:
    """Return the names; ``folds``: names that differ only in case are equal, as on some disks."""
    if column is None:
        return []
    cells = table.columns[column.header]
    names = ["" if cell is None else str(cell) for cell in cells]
    seen: dict[str, int] = {}
    for index, (name, number) in enumerate(zip(names, table.numbers, strict=True)):
        if fault := find_fault(name):
            faults.add(fault, [number])
            continue
        first = seen.setdefault(folded(name) if folds else name, index)
        if first != index:
            other, at = names[first], table.numbers[first]
            same = "the same" if other == name else f"the same folder as {other!r} where case does not count"
            faults.add(f"the name {name!r} is {same}, in row {at}; names must differ", [number])
    return names


def _cells(
    table: Table, column: Column | None, faults: Faults, read: Callable[[Any], Any]
) -> list[Any] | None:
    """Return the values of a column, None for empty cells, each distinct cell read once; None without the column."""
    if column is None:
        return None
    known: dict[tuple[type, str], Any] = {}
    values: list[Any] = []
    for cell, number in zip(table.columns[column.header], table.numbers, strict=True):
        if cell in EMPTY:
            values.append(None)
            continue
        name = (type(cell), cell if isinstance(cell, str) else repr(cell))
        if name not in known:
            try:
                known[name] = read(cell)
            except ValueError as error:
                known[name] = error
        value = known[name]
        if isinstance(value, ValueError):
            faults.add(f"column {column.header}: {value}", [number])
            value = None
        values.append(value)
    return values


def _priority(cell: Any) -> float:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{cell!r} is not a number; subjects with higher numbers come first")
    return value


def _text(cell: Any) -> str:
    if not isinstance(cell, str):
        raise ValueError(f"{cell!r} is not text")
    return cell


def _choose(
    table: Table, columns: Sequence[Column], faults: Faults
) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the distinct combinations of values of recipe keys, and the index of the combination of each row."""
    read = {column.key: _cells(table, column, faults, column.value) or [] for column in columns}
    known: dict[str, int] = {}
    choices: list[dict[str, Any]] = []
    chosen = []
    for index in range(len(table.numbers)):
        values = {key: cells[index] for key, cells in read.items() if cells[index] is not None}
        name = repr(values)
        if name not in known:
            known[name] = len(choices)
            choices.append(values)
        chosen.append(known[name])
    return choices, chosen


def _check_images(
    table: Table, places: Sequence[str | None], faults: Faults, elsewhere: Sequence[str]
) -> None:
    rows: dict[str, list[int]] = {}
    for place, number in zip(places, table.numbers, strict=True):
        if place is not None and not all(is_under(path, elsewhere) for path in paths_in(place)):
            rows.setdefault(place, []).append(number)
    for place, fault in find_faults(rows).items():
        faults.add(f"images: {fault}", rows[place])
