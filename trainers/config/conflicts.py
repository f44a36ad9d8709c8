"""What cannot run: settings that exclude one another, told when a recipe is read, and what a run lacks, told first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from dreamfleet.datasets.errors import RecipeError, ResourceError, UserError
from dreamfleet.trainers.config.engines import engine_spec, find_refused
from dreamfleet.trainers.config.metrics import METRICS, NEEDS
from dreamfleet.trainers.config.validation_errors import tell

if TYPE_CHECKING:
    from dreamfleet.trainers.recipe import Recipe


def find_conflicts(recipe: Recipe) -> list[str]:
    """List what does not go together, each with the way out."""
    train, optimizer, engine = recipe.train, recipe.optimizer, recipe.engine
    workers = recipe.scaling.num_workers
    found = {
        "engine.channels_last does not go with optimizer.name: adamw8bit, which lays every weight out anew at its "
        "first step; set channels_last: false, or use adamw": engine.channels_last
        and optimizer.name == "adamw8bit",
        "engine.offload_param_device: nvme keeps weights in 16 bits; set train.mixed_precision: bf16, or "
        "offload_param_device: cpu": engine.offload_param_device == "nvme" and train.mixed_precision == "no",
        "data.enable_bucket does not go with prior preservation: class pictures would have to be of their instances' "
        "sizes; set enable_bucket: false, or method.with_prior_preservation: false": recipe.data.enable_bucket
        and getattr(recipe.method, "with_prior_preservation", False),
    }
    for name in recipe.validation.metrics:
        found[f"validation.metrics: {name} needs {NEEDS['dino']}"] = (
            "dino" in METRICS.get(name).needs and not recipe.validation.dino
        )
    fused = {
        f"train.gradient_accumulation_steps: {train.gradient_accumulation_steps} (it must be 1)": (
            train.gradient_accumulation_steps > 1
        ),
        f"scaling.num_workers: {workers} (one at most)": workers > 1,
        "train.mixed_precision: fp16 (bf16 or no), as a step that overflowed could not be taken back": (
            train.mixed_precision == "fp16"
        ),
    }
    if optimizer.fused_backward:
        found |= {
            f"optimizer.fused_backward: true steps inside backward and does not go with {what}": is_so
            for what, is_so in fused.items()
        }
    return [*_engine_conflicts(recipe), *(told for told, is_so in found.items() if is_so)]


def _engine_conflicts(recipe: Recipe) -> list[str]:
    """List the keys that the recipe's engine does not support, and wrong keys of its options."""
    engine = recipe.engine
    try:
        spec = engine_spec(engine)
        spec.Options.model_validate(engine.options)
    except UserError as error:
        return [f"engine.name: {error}"]
    except ValidationError as error:
        return tell(error, spec.Options, homes={}, prefix="engine.options")
    return find_refused(dict(recipe), spec.refused(engine), by=spec.setting(engine))


def require_runnable(recipe: Recipe, *, has_gpu: bool | None = None) -> None:
    """Refuse what would end a run after its class images and latents are made.

    ``has_gpu``: whether the workers have one; None where that is not known yet. Raises RecipeError when nothing says
    how long to train, ResourceError for what only a GPU can do.
    """
    train = recipe.train
    if train.max_train_steps is None and train.num_train_epochs is None:
        raise RecipeError(
            "train: nothing says how long to train; set max_train_steps (optimizer steps) or num_train_epochs"
        )
    if has_gpu is False:
        if train.mixed_precision == "fp16":
            raise ResourceError("train.mixed_precision: fp16 needs a GPU; use bf16 or no on this machine")
        if recipe.optimizer.name == "adamw8bit":
            raise ResourceError("optimizer.name: adamw8bit needs a GPU; use adamw on this machine")
