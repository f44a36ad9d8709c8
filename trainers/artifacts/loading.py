"""Loads a model for sampling from a run's exports or from an artifact."""

from __future__ import annotations

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.artifacts.kind import ARTIFACTS, ArtifactKind, detect_kind, kinds
from dreamfleet.trainers.config.method import MethodConfig
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.models.family import DiffusionModel, load_model
from dreamfleet.trainers.recipe import Recipe


def load_exported(run: Storage, recipe: Recipe) -> DiffusionModel:
    """Load the exported model of a run, or the recipe's base model with the run's artifact applied.

    Raises UserError if the run has no export that can be used for sampling.
    """
    present = [*run.list("exports"), *run.list_dirs("exports")]
    section = recipe.method.model_dump()
    for kind in (ARTIFACTS.get(name)() for name in recipe.method.artifacts):
        for name in kind.exported_names(recipe.run_name, section):
            if name in present:
                return _load(kind, run.path("exports", name), recipe.model, recipe.method)[0]
    raise UserError(
        f"{run.url}: no export that images can be generated with (exports/ has {', '.join(present) or 'nothing'}). "
        "Finish the run, or write one with `dreamfleet export`."
    )


def load_artifact(
    address: str, base: ModelConfig, method: MethodConfig | None = None
) -> tuple[DiffusionModel, str]:
    """Load a whole model, or ``base`` with an artifact applied; return the model and the artifact's word, or "".

    ``method``: the recipe section of the run that exported it, with its word, strength and other options. Raises
    FormatError for a file or folder of an unknown kind.
    """
    return _load(kind_of(address), address, base, method)


def kind_of(address: str) -> ArtifactKind:
    """Return the kind of an artifact on disk or in a bucket. Raises FormatError naming the known kinds."""
    place = Storage(address)
    if marked := folder_kind(place):
        return marked
    with place.local_copy() as path:
        return detect_kind(path, address=address)


def folder_kind(place: Storage) -> ArtifactKind | None:
    """Return the kind of a folder, on disk or in a bucket, judging by its marker file; None for anything else."""
    return next((kind for kind in kinds() if kind.marker and place.exists(kind.marker)), None)


def is_artifact_name(name: str) -> bool:
    """Return whether a file name has the suffix of an artifact."""
    return name.lower().endswith(tuple(suffix for kind in kinds() for suffix in kind.suffixes))


def _load(
    kind: ArtifactKind, address: str, base: ModelConfig, method: MethodConfig | None
) -> tuple[DiffusionModel, str]:
    if kind.is_model:
        return load_model(base.model_copy(update={"pretrained_model_name_or_path": address})), ""
    with Storage(address).local_copy() as path:
        model = load_model(base)
        return model, kind.load_into(model, path, address=address, method=method)
