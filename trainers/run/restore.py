"""Finds the checkpoint that a run continues from, and loads it into the run's parts."""

from __future__ import annotations

import logging

from dreamfleet.datasets.errors import CheckpointError, RecipeError
from dreamfleet.trainers.distributed.agreement import compare
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.run.build import Parts
from dreamfleet.trainers.run.checkpoint import Checkpoint, Checkpoints
from dreamfleet.trainers.run.provenance import run_identity

log = logging.getLogger(__name__)


def newest_checkpoint(checkpoints: Checkpoints, distributed: DistributedContext) -> Checkpoint | None:
    """Read on every rank the newest checkpoint that is valid on rank 0; return None if there is none.

    Raises CheckpointError on every rank if a rank cannot read it, StorageError if a rank reads different
    content.
    """
    kept: list[Checkpoint | None] = []

    def find() -> int | None:
        kept.append(checkpoints.load_to_continue())
        return kept[0].step if kept[0] is not None else None

    step = distributed.on_rank_0(find)
    if step is None:
        return None
    found = distributed.on_every_rank(lambda: kept[0] if kept else checkpoints.load(step))
    compare(
        {f"the checkpoint of step {step}": distributed.on_every_rank(lambda: checkpoints.digest(step))},
        distributed,
    )
    return found


def restore(found: Checkpoint, parts: Parts) -> int:
    """Load a checkpoint into a run's parts; return its step.

    Raises CheckpointError if the checkpoint is of another method or does not fit the recipe. Logs a warning
    if dataset, base model, global batch or seed changed.
    """
    recipe, is_main = parts.recipe, parts.distributed.is_main
    name = found.meta.get("method")
    if name != recipe.method.name:
        raise CheckpointError(
            f"the checkpoint of step {found.step} is of {name}, this recipe is for {recipe.method.name}"
        )
    try:
        parts.engine.load_weights(found.learned)
        parts.engine.load_state(found.engine)
        parts.method.steps_before = found.meta.get("steps_before", 0)
    except RecipeError as error:
        raise CheckpointError(f"the checkpoint of step {found.step} does not fit: {error}") from error
    now = run_identity(parts)
    changed = [key for key, value in now.items() if found.meta.get(key, value) != value]
    if changed and is_main:
        log.warning(
            "continuing from step %d although %s changed: the run continues, but not as if it had never stopped",
            found.step,
            ", ".join(changed),
        )
    if is_main:
        log.info("continuing from step %d", found.step)
    return found.step
