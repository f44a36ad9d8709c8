"""Exports artifacts from any checkpoint of a run, in any format of its method."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from dreamfleet.datasets.errors import CheckpointError, RecipeError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.methods.base import Method
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.trainers.run.build import make_method
from dreamfleet.trainers.run.checkpoint import Checkpoint, Checkpoints
from dreamfleet.trainers.run.provenance import artifact_metadata
from dreamfleet.trainers.run.webui_optimizer import OPTIM, require_resumable, write_optimizer_state


def export_run(target: str, formats: Sequence[str], out: str | None = None) -> list[str]:
    """Export a run's newest checkpoint, or the one ``target`` names (``RUN/checkpoints/step-000500``).

    ``out`` is a folder or an address in a bucket; None: the run's ``exports/`` folder. The format ``optim``
    writes ``pt`` and the webui's optimizer file beside it. Returns the paths or addresses of the written
    files. Raises RecipeError for a folder that is not a run and for a format that the run's method lacks,
    CheckpointError if there is no valid checkpoint.
    """
    run, step = find_checkpoint(target)
    recipe = read_recipe(run)
    checkpoints = Checkpoints(run)
    found = checkpoints.load(step) if step is not None else checkpoints.load_latest()
    if found is None:
        raise CheckpointError(f"{run.url} has no complete checkpoint to export")
    method = load_method(recipe, found)
    forms = [form for form in formats if form != OPTIM]
    if with_optimizer := OPTIM in formats:
        require_resumable(recipe, method)
        forms = list(dict.fromkeys([*forms, "pt"]))
    place = Storage(out) if out else run.child("exports")
    with tempfile.TemporaryDirectory(prefix="dreamfleet-export-") as folder:
        paths = write_artifacts(
            recipe,
            method,
            Path(folder),
            formats=forms,
            step=found.step,
            dataset_hash=found.meta["dataset_hash"],
        )
        if with_optimizer:
            paths.append(write_optimizer_state(recipe, found, Path(folder) / f"{recipe.run_name}.pt"))
        for path in paths:
            place.upload(path, path.name)
        return [place.path(path.name) for path in paths]


def export_artifacts(
    recipe: Recipe, method: Method, storage: Storage, *, step: int, dataset_hash: str
) -> list[str]:
    """Write a run's artifacts into ``storage`` in its recipe's formats; return the file names."""
    with tempfile.TemporaryDirectory(prefix="dreamfleet-export-") as folder:
        paths = write_artifacts(recipe, method, Path(folder), step=step, dataset_hash=dataset_hash)
        for path in paths:
            storage.upload(path, path.name)
        return [path.name for path in paths]


def write_artifacts(
    recipe: Recipe,
    method: Method,
    folder: Path,
    *,
    step: int,
    dataset_hash: str,
    formats: Sequence[str] | None = None,
) -> list[Path]:
    """Write artifacts into a local folder; return their paths. ``formats``: None for the recipe's formats."""
    return method.export(
        Export(
            folder,
            recipe.run_name,
            formats=recipe.train.export_formats or () if formats is None else formats,
            step=step,
            metadata=artifact_metadata(recipe, step, dataset_hash=dataset_hash, base=method.base),
            precision=recipe.train.save_precision,
        )
    )


def find_checkpoint(target: str) -> tuple[Storage, int | None]:
    """Split ``RUN`` or ``RUN/checkpoints/step-000500`` into run folder and step (None: the newest)."""
    head, _, last = target.rstrip("/").rpartition("/")
    if last.startswith("step-") and last.removeprefix("step-").isdigit():
        return Storage(head.removesuffix("/checkpoints")), int(last.removeprefix("step-"))
    return Storage(target), None


def read_recipe(run: Storage) -> Recipe:
    """Read the recipe of a run folder. Raises RecipeError for a folder that is not a run."""
    import yaml

    if not run.exists("recipe.yaml"):
        raise RecipeError(f"{run.url} is not a run folder: it has no recipe.yaml")
    return build_recipe(yaml.safe_load(run.read_text("recipe.yaml")), source=run.path("recipe.yaml"))


def load_method(recipe: Recipe, found: Checkpoint) -> Method:
    """Build the run's method on the CPU with a checkpoint's weights, or its EMA weights if it has them."""
    method = make_method(recipe, None, torch.device("cpu"))
    method.load_state(found.learned)
    method.steps_before = found.meta.get("steps_before", 0)
    if "ema" in found.engine:
        with torch.no_grad():
            for group in method.groups():
                for name, param in group.params.items():
                    # in float32, also for parameters of lower precision
                    param.data = found.engine["ema"][name].float()
    return method
