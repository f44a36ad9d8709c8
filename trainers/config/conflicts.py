"""What cannot run: settings that exclude one another, told when a recipe is read, and what a run lacks, told first."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.config_base import Section
from dreamfleet.datasets.errors import RecipeError, ResourceError, UserError
from dreamfleet.trainers.config.engine import EngineConfig
from dreamfleet.trainers.config.engines import engine_spec, find_refused
from dreamfleet.trainers.config.method import MethodConfig
from dreamfleet.trainers.config.metrics import METRICS, NEEDS
from dreamfleet.trainers.config.optimizer import OptimizerConfig
from dreamfleet.trainers.config.scaling import ScalingConfig
from dreamfleet.trainers.config.train import TrainConfig
from dreamfleet.trainers.config.validation import ValidationConfig
from dreamfleet.trainers.config.validation_errors import explain


def find_conflicts(
    *,
    method: MethodConfig,
    data: DataConfig,
    train: TrainConfig,
    optimizer: OptimizerConfig,
    engine: EngineConfig,
    validation: ValidationConfig,
    scaling: ScalingConfig,
) -> list[str]:
    """Return an error for each combination of settings that cannot run, with the remedy."""
    workers = scaling.num_workers
    found = {
        "engine.channels_last does not go with optimizer.name: adamw8bit, which lays every weight out anew at its "
        "first step; set channels_last: false, or use adamw": engine.channels_last
        and optimizer.name == "adamw8bit",
        "engine.offload_param_device: nvme keeps weights in 16 bits; set train.mixed_precision: bf16, or "
        "offload_param_device: cpu": engine.offload_param_device == "nvme" and train.mixed_precision == "no",
        "data.enable_bucket does not go with prior preservation: class pictures would have to be of their instances' "
        "sizes; set enable_bucket: false, or method.with_prior_preservation: false": data.enable_bucket
        and getattr(method, "with_prior_preservation", False),
    }
    for name in validation.metrics:
        found[f"validation.metrics: {name} needs {NEEDS['dino']}"] = (
            "dino" in METRICS.get(name).needs and not validation.dino
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
    sections = {
        "data": data,
        "train": train,
        "optimizer": optimizer,
        "engine": engine,
        "validation": validation,
    }
    sections |= {"method": method, "scaling": scaling}
    return [*_engine_conflicts(engine, sections), *(told for told, is_so in found.items() if is_so)]


def _engine_conflicts(engine: EngineConfig, sections: Mapping[str, Section]) -> list[str]:
    """Return an error for each key that the engine does not support, and for wrong keys of its options."""
    try:
        spec = engine_spec(engine)
        spec.Options.model_validate(engine.options)
    except UserError as error:
        return [f"engine.name: {error}"]
    except ValidationError as error:
        return explain(error, spec.Options, homes={}, prefix="engine.options")
    return find_refused(sections, spec.refused(engine), by=spec.setting(engine))


def require_runnable(train: TrainConfig, optimizer: OptimizerConfig, *, has_gpu: bool | None = None) -> None:
    """Raise before class images and latents are made for settings with which the run would fail afterwards.

    ``has_gpu``: whether the workers have a GPU; None if that is not known yet. Raises RecipeError if the length of the
    training is not set, ResourceError for settings that need a GPU.
    """
    if train.max_train_steps is None and train.num_train_epochs is None:
        raise RecipeError(
            "train: nothing says how long to train; set max_train_steps (optimizer steps) or num_train_epochs"
        )
    if has_gpu is False:
        if train.mixed_precision == "fp16":
            raise ResourceError("train.mixed_precision: fp16 needs a GPU; use bf16 or no on this machine")
        if optimizer.name == "adamw8bit":
            raise ResourceError("optimizer.name: adamw8bit needs a GPU; use adamw on this machine")
