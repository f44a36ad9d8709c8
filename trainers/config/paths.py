"""The paths that a recipe names, by their keys: what the ranks of a run read and write."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dreamfleet.datasets.index.concepts import load_concepts

if TYPE_CHECKING:
    from dreamfleet.trainers.recipe import Recipe

SECTIONS = ("method", "model", "data", "engine", "validation")
# Endings of keys whose values are words for the model.
WORDS = ("prompt", "prompts", "token", "prefix", "suffix", "separator", "text")
OF_EACH_MACHINE = ("engine.nvme_path",)  # every machine has its own, on purpose
CONCEPTS = "data.concepts_list"
PathsByKey = dict[str, list[str]]


def paths_in(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield the key and the path of every path and address in a part of a resolved recipe, where both are absolute."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from paths_in(inner, f"{key}.{name}")
    elif isinstance(value, list):
        for inner in value:
            yield from paths_in(inner, key)
    elif is_path(value, key):
        yield key, value


def is_path(value: Any, key: str) -> bool:
    """Say whether the value of a key in a resolved recipe is a path or an address."""
    return isinstance(value, str) and (value.startswith("/") or "://" in value) and not key.endswith(WORDS)


def named_paths(recipe: Recipe) -> PathsByKey:
    """List the paths and addresses that a recipe's sections name, by key."""
    sections = recipe.model_dump(mode="json")
    found: PathsByKey = {}
    for section in SECTIONS:
        for key, path in paths_in(sections[section], section):
            found.setdefault(key, []).append(path)
    return found


def shared_paths(recipe: Recipe) -> PathsByKey:
    """List what all machines have to see, by key: what the recipe names, and the folders of a file of concepts."""
    found = {key: paths for key, paths in named_paths(recipe).items() if key not in OF_EACH_MACHINE}
    if isinstance(recipe.data.concepts_list, str):
        for concept in load_concepts(recipe.data):
            for key, path in paths_in(concept.model_dump(mode="json"), CONCEPTS):
                found.setdefault(key, []).append(path)
    return found


def written_paths(recipe: Recipe) -> PathsByKey:
    """List the folders that a run writes to, by key: its own, and those that class images may be generated into."""
    found = {"output_dir": [recipe.output_dir]}
    if not getattr(recipe.method, "with_prior_preservation", False):
        return found
    for concept in load_concepts(recipe.data):
        folder = concept.class_data_dir
        if folder is None:
            found["class images beside output_dir"] = [generated_folder(recipe.output_dir)]
        elif "://" in folder or not os.path.exists(folder) or os.access(folder, os.W_OK):
            found.setdefault("data.class_data_dir", []).append(folder)
    return found


def generated_folder(output_dir: str) -> str:
    """Return the folder beside a run's where class images without a ``class_data_dir`` are kept."""
    return f"{output_dir.rstrip('/').rpartition('/')[0]}/class-images"


def is_under(path: str, folders: Sequence[str]) -> bool:
    """Say whether a path is one of the folders, or lies in one."""
    roots = [os.path.abspath(os.path.expanduser(folder)).rstrip("/") for folder in folders]
    return any(path == root or path.startswith(f"{root}/") for root in roots)


def compared_paths(recipe: Recipe) -> PathsByKey:
    """List the files and folders that have to be the same on all ranks as a whole, by key.

    Of sets of images only those that are used have to be, and an index tells which.
    """
    return {
        key: paths
        for key, paths in named_paths(recipe).items()
        if key not in (*OF_EACH_MACHINE, "validation.holdout")
        and (key == CONCEPTS or not key.startswith("data."))
    }
