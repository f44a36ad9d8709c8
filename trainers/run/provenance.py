"""Provenance of a run (versions, dataset, base model) for its checkpoints, recipe.yaml and artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dreamfleet.datasets.json_text import json_text
from dreamfleet.trainers.config.engines import engine_spec
from dreamfleet.trainers.methods.base import Base
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.run.build import Parts
from dreamfleet.trainers.run.versions import versions


def run_identity(parts: Parts) -> dict[str, Any]:
    """Return the values that must not change if a resumed run is to equal an uninterrupted one."""
    return {
        "dataset_hash": parts.sets.instances.content_hash,
        "base_model_hash": parts.method.base.content_hash,
        "global_batch": parts.global_batch,
        "seed": parts.recipe.train.seed,
    }


def provenance(parts: Parts, engine_reason: str) -> str:
    """Return the comment lines at the top of a run's recipe.yaml: versions, dataset, base model, engine."""
    lines = [f"{name} {number}" for name, number in versions().items()]
    engine = engine_spec(parts.recipe.engine).summary(parts.recipe.engine)
    return (
        f"# {', '.join(lines)}\n"
        f"# dataset {parts.sets.instances.content_hash} ({len(parts.sets.instances)} images)\n"
        f"# base model {' '.join(filter(None, parts.method.base[:2]))}\n"
        f"# engine {engine} ({' '.join(engine_reason.split())})\n"
    )


def artifact_metadata(recipe: Recipe, step: int, *, dataset_hash: str, base: Base) -> dict[str, str]:
    """Return the metadata of each artifact, as strings: version, method, step, recipe, data, base model."""
    resolved = recipe.model_dump(mode="json")
    # Artifacts are published, so folder names, which may be private, are removed from all paths.
    resolved = _without_folders(resolved)
    return {
        "dreamfleet_version": versions().get("dreamfleet", "unknown"),
        "dreamfleet_method": recipe.method.name,
        "dreamfleet_step": str(step),
        "dreamfleet_recipe": json_text(resolved),
        "dreamfleet_dataset_hash": dataset_hash,
        "dreamfleet_base_model": Path(base.name).name,
        "dreamfleet_base_model_hash": base.content_hash,
    }


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    if isinstance(value, str) and (value.startswith("/") or "://" in value):
        return value.rstrip("/").rpartition("/")[2]
    return value
