"""Validates the recipe keys of a table of subjects: each combination of values once, columns of many values alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.path_field import NamedPath
from dreamfleet.trainers.config.conflicts import require_runnable
from dreamfleet.trainers.config.validation_errors import explain
from dreamfleet.trainers.driver.preflight import check_exists
from dreamfleet.trainers.recipe import Recipe, validate_recipe
from dreamfleet.tune.fleet.columns import Column
from dreamfleet.tune.fleet.subjects import PLACEHOLDER, Faults, SubjectRecipes, put

MANY = 300  # distinct values of a column beyond which they are validated within their section alone


def check_values(
    recipes: SubjectRecipes,
    numbers: Sequence[int],
    columns: Sequence[Column],
    texts: Mapping[str, Sequence[str | None]],
    choices: Sequence[Mapping[str, Any]],
    chosen: Sequence[int],
    faults: Faults,
    *,
    looks: bool,
) -> None:
    """Add an error for each invalid value, and for values that cannot be combined.

    ``numbers``: of the rows. ``choices[chosen[i]]``: the values of row ``i`` by key; ``texts``: its images and prompts.
    ``looks``: whether to check that files exist. A column with many values, such as a seed for each subject, takes part
    in the combinations with its first value.
    """
    rows: list[list[int]] = [[] for _ in choices]
    for number, choice in zip(numbers, chosen, strict=True):
        rows[choice].append(number)
    first: dict[str, Any] = {}
    for column in columns:
        cells: dict[str, tuple[Any, list[int]]] = {}
        for choice, values in enumerate(choices):
            if (value := values.get(column.key)) is not None:
                cells.setdefault(repr(value), (value, []))[1].extend(rows[choice])
        if len(cells) > MANY and "." in column.key:
            first[column.key] = next(iter(cells.values()))[0]
            for value, where in cells.values():
                faults.add_all(_find_section_errors(recipes.base, column.key, value), where)
        if looks and column.path_field is not None:
            for value, where in cells.values():
                faults.add_all(_find_path_errors(column, value, recipes.folder), where)
    combined: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for index, number in enumerate(numbers):
        given = {key: PLACEHOLDER for key, cells in texts.items() if cells[index] is not None}
        values = {**given, **choices[chosen[index]]}
        values |= {key: value for key, value in first.items() if key in values}
        combined.setdefault(repr(values), (values, []))[1].append(number)
    for values, where in combined.values():
        faults.add_all(_find_errors(recipes, values), where)


def _find_errors(recipes: SubjectRecipes, values: Mapping[str, Any]) -> list[str]:
    """Return the errors of the recipe with values by key."""
    recipe, errors = validate_recipe(recipes.tree(values))
    if recipe is None or errors:
        return errors
    try:
        require_runnable(recipe.train, recipe.optimizer)
    except UserError as error:
        errors.append(str(error))
    has_prior = getattr(recipe.method, "with_prior_preservation", False)
    if has_prior and recipe.data.instance_data_dir and recipe.data.class_prompt is None:
        errors.append("class_prompt is empty, and method.with_prior_preservation needs it")
    return errors


def _find_section_errors(recipe: Recipe, key: str, value: Any) -> list[str]:
    """Return the errors of one value within its section."""
    name, _, rest = key.partition(".")
    section = getattr(recipe, name)
    tree = section.model_dump(mode="json")
    put(tree, rest, value)
    try:
        type(section).model_validate(tree)
    except ValidationError as error:
        return explain(error, type(section), homes={}, prefix=name)
    return []


def _find_path_errors(column: Column, value: Any, folder: str) -> list[str]:
    """Return the error of a path that does not exist."""
    assert column.path_field is not None
    if not isinstance(value, str):
        return []
    try:
        check_exists(NamedPath(column.key, column.path_field.resolve(value, folder), column.path_field))
    except UserError as error:
        return [str(error)]
    return []
