"""Exchange of Adam's moments with the webui: writes `NAME.pt.optim`, and loads its moments into an engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamfleet.datasets.errors import CheckpointError, RecipeError
from dreamfleet.trainers.config.methods.textual_inversion import TextualInversionConfig
from dreamfleet.trainers.engines.base import Engine
from dreamfleet.trainers.methods.base import Method
from dreamfleet.trainers.methods.hypernetwork import HypernetworkMethod
from dreamfleet.trainers.methods.textual_inversion import TextualInversion
from dreamfleet.trainers.models.formats.embedding import read_embedding
from dreamfleet.trainers.models.formats.optimizer_file import (
    AdamState,
    OptimizerFile,
    file_hash,
    write_optimizer,
)
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.run.checkpoint import Checkpoint, require_optimizer

log = logging.getLogger(__name__)
OPTIM = "optim"  # the export format


def require_resumable(recipe: Recipe, method: Method) -> None:
    """Raise RecipeError if the webui has no optimizer file for a run's method, model or optimizer."""
    if not isinstance(method, TextualInversion | HypernetworkMethod):
        raise RecipeError(
            f"{method.name} has no export format {OPTIM!r}: the webui trains embeddings and hypernetworks only"
        )
    if reason := method.model.unsupported.get(OPTIM):
        raise RecipeError(f"the export format {OPTIM!r} is not available for {method.model.title}: {reason}")
    if recipe.optimizer.name != "adamw":
        raise RecipeError(
            f"the export format {OPTIM!r} needs optimizer.name: adamw; the webui reads no moments of "
            f"{recipe.optimizer.name}"
        )


def write_optimizer_state(recipe: Recipe, found: Checkpoint, artifact: Path) -> Path:
    """Write a checkpoint's Adam moments to `.optim` beside the `.pt` exported from it; return its path.

    Raises CheckpointError for a checkpoint that was saved before the first step or without optimizer state.
    """
    require_optimizer(found, f"exported as {OPTIM!r}")
    entries: Mapping[int, Mapping[str, Any]] = found.engine["optimizer"]["state"]
    if not entries:
        raise CheckpointError(
            "the checkpoint is from before the first step: its optimizer has no moments yet"
        )
    # The webui's parameter order is that of the method's group: in a hypernetwork file widths ascend.
    states = tuple(
        AdamState(float(entry["step"]), entry["exp_avg"], entry["exp_avg_sq"])
        for _, entry in sorted(entries.items())
    )
    if isinstance(recipe.method, TextualInversionConfig):
        file = OptimizerFile(read_embedding(artifact).checksum, states)
    else:
        file = OptimizerFile(file_hash(artifact), states, "AdamW")
    options: Any = recipe.optimizer.own_options()
    return write_optimizer(
        artifact,
        file,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
    )


def take_over(engine: Engine, moments: Mapping[str, AdamState], weights: Mapping[str, Tensor]) -> None:
    """Load Adam's moments, by parameter name, into a new engine; optimizers other than AdamW ignore them.

    ``weights``: the unsharded initial weights of the engine, by name, which its EMA weights start from.
    """
    if engine.optimizer_name != "adamw":
        log.info(
            "optimizer.name: %s starts from scratch; only adamw loads the saved moments",
            engine.optimizer_name,
        )
        return
    state = engine.state()
    state["optimizer"]["state"] = {
        number: {
            "step": torch.tensor(moments[name].step),
            "exp_avg": moments[name].exp_avg,
            "exp_avg_sq": moments[name].exp_avg_sq,
        }
        for number, name in enumerate(engine.params)
    }
    if "ema" in state:
        state["ema"] = dict(weights)
    engine.load_state(state)
    log.info("the optimizer continues with moments of %d steps", max(adam.step for adam in moments.values()))
