"""Packages a fleet for a job: its recipe, its table of subjects, and the local images that the table names."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any

from dreamfleet.cluster.jobs.package import MAX_PACKAGE_BYTES, LocalFiles, Package, pack
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.path_field import NamedPath, PathField, is_under
from dreamfleet.trainers.config.method import METHODS
from dreamfleet.trainers.config.recipe_keys import recipe_keys
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.tune.fleet.columns import IMAGES
from dreamfleet.tune.fleet.fleet import load_base
from dreamfleet.tune.fleet.image_places import paths_in
from dreamfleet.tune.fleet.read_subjects import read_subjects
from dreamfleet.tune.fleet.subjects import PLACEHOLDER, Subjects
from dreamfleet.tune.fleet.table import read_table

SUBJECTS_FILE = "subjects.jsonl"
BESIDE = (".txt", ".caption", ".mask.png", "_att.png")  # endings of files that belong to a listed image


def pack_fleet(
    subjects: str,
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    shared: Sequence[str] = (),
    resume: bool = False,
    limit: int = MAX_PACKAGE_BYTES,
) -> Package:
    """Check a fleet, and choose the files that its job needs, as :func:`pack` does for a run.

    The table of the package has one line for each row, with the same number. Raises RecipeError that lists all errors
    of the table, and for more than ``limit`` bytes.
    """
    base, has_images = load_base(recipe, overrides)
    table = read_table(subjects)
    found, _ = read_subjects(table, base, has_images=has_images, elsewhere=shared)
    if not has_images:
        data = base.data.model_copy(update={"instance_data_dir": PLACEHOLDER})
        base = base.model_copy(update={"data": data})
    package = pack(base, shared=shared, resume=resume, limit=limit)
    local = LocalFiles(
        lambda path: "://" in path or is_under(path, shared), resume=resume, start=package.files
    )
    rows = _rows(found, base, table.folder, local)
    local.refuse_more_than(limit)
    return dataclasses.replace(package, files=local.files, texts={SUBJECTS_FILE: rows})


def _rows(subjects: Subjects, base: Recipe, folder: str, local: LocalFiles) -> str:
    """Return the lines of the package's table; add the files that they name to ``local``."""
    keys: dict[str, Any] = {}
    for method in {base.method.name, *(one.values.get("method.name", base.method.name) for one in subjects)}:
        keys |= recipe_keys(Recipe, {"method": METHODS.get(method)})
    lines: list[str] = []
    for subject in subjects:
        row: dict[str, Any] = {"name": subject.name, "priority": subject.priority}
        for key, value in subject.values.items():
            field = keys[key].path_field
            if key == IMAGES:
                row[key] = _take_images(value, local)
            elif field is not None and isinstance(value, str):
                row[key] = local.take(NamedPath(key, field.resolve(value, folder), field))
            else:
                row[key] = value
        lines += [""] * (subject.row - 1 - len(lines))  # keeps the numbers of the rows
        lines.append(json_text(row))
    return "\n".join(lines) + "\n"


def _take_images(place: str, local: LocalFiles) -> Any:
    """Return the cell of images in the package."""
    field = PathField("images")
    paths = paths_in(place)
    if paths == [place]:
        return local.take(NamedPath("images", place, field), prefix=_prefix(place))
    cells = []
    for path in paths:
        taken = local.take(NamedPath("images", path, field), prefix=f"{_prefix(os.path.dirname(path))}/")
        cells.append(taken)
        if taken != path:
            local.add_beside(path, BESIDE)
    return cells


def _prefix(path: str) -> str:
    """Return a text by which folders of equal names differ, the same in every package, so that rows stay equal."""
    return hashlib.sha256(path.encode()).hexdigest()[:8] + "-"
