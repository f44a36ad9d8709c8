"""Checks of a recipe across sections: settings that cannot be combined, and settings that a run requires."""

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
from dreamfleet.trainers.config.optimizer_conflicts import find_optimizer_conflicts
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
    sections = {"method": method, "data": data, "train": train, "optimizer": optimizer, "engine": engine}
    found = _engine_conflicts(engine, {**sections, "validation": validation, "scaling": scaling})
    found += find_optimizer_conflicts(optimizer, engine, method)
    if engine.offload_param_device == "nvme" and train.mixed_precision == "no":
        found.append(
            "engine.offload_param_device: nvme keeps weights in 16 bits; set train.mixed_precision: bf16, or "
            "offload_param_device: cpu"
        )
    if data.enable_bucket and getattr(method, "with_prior_preservation", False):
        found.append(
            "data.enable_bucket cannot be combined with prior preservation: class images would need the sizes of their "
            "instance images; set enable_bucket: false, or method.with_prior_preservation: false"
        )
    if reason := method.refused_by_engine(engine):
        found.append(reason)
    if data.cache_resources is not None and scaling.is_local:
        found.append(
            "data.cache_resources starts processes on a Ray cluster, and scaling.num_workers: 0 trains without Ray; "
            "set num_workers: 1 (a local Ray is started if there is no cluster), or leave data.cache_resources out"
        )
    found += _validation_conflicts(validation, train, scaling)
    found += _fused_conflicts(optimizer, train, scaling)
    return found


def _fused_conflicts(optimizer: OptimizerConfig, train: TrainConfig, scaling: ScalingConfig) -> list[str]:
    """Return an error for each setting that steps during the backward pass cannot be combined with."""
    fused = {
        f"train.gradient_accumulation_steps: {train.gradient_accumulation_steps} (it must be 1)": (
            train.gradient_accumulation_steps > 1
        ),
        f"scaling.num_workers: {scaling.words} (it must be 0 or 1)": scaling.max_workers > 1,
        "train.mixed_precision: fp16 (use bf16 or no), because a step that overflowed cannot be undone": (
            train.mixed_precision == "fp16"
        ),
    }
    return [
        f"optimizer.fused_backward: true steps during the backward pass and cannot be combined with {setting}"
        for setting, is_set in fused.items()
        if optimizer.fused_backward and is_set
    ]


def _validation_conflicts(
    validation: ValidationConfig, train: TrainConfig, scaling: ScalingConfig
) -> list[str]:
    """Return an error for each metric without its model, and for resources that cannot compute the rounds."""
    found = [
        f"validation.metrics: {name} needs {NEEDS['dino']}"
        for name in validation.metrics
        if "dino" in METRICS.get(name).needs and not validation.dino
    ]
    if validation.resources is not None and scaling.is_local:
        found.append(
            "validation.resources starts a process on a Ray cluster, and scaling.num_workers: 0 trains without Ray; "
            "set num_workers: 1 (a local Ray is started if there is no cluster), or leave validation.resources out"
        )
    if (
        validation.resources is not None
        and "GPU" not in validation.resources
        and train.mixed_precision == "fp16"
    ):
        found.append(
            "validation.resources without a GPU cannot compute in train.mixed_precision: fp16; add GPU: 1, or use bf16"
        )
    return found


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
    """Raise for settings that would make the run fail, before class images and latents are generated.

    ``has_gpu``: whether the workers have a GPU; None if that is not known yet. Raises RecipeError if the length of the
    training is not set, ResourceError for settings that need a GPU.
    """
    if train.max_train_steps is None and train.num_train_epochs is None:
        raise RecipeError(
            "train: the length of the training is not set; set max_train_steps (optimizer steps) or num_train_epochs"
        )
    if has_gpu is False:
        if train.mixed_precision == "fp16":
            raise ResourceError("train.mixed_precision: fp16 needs a GPU; use bf16 or no on this machine")
        if optimizer.kind.needs_gpu:
            raise ResourceError(f"optimizer.name: {optimizer.name} needs a GPU; use adamw on this machine")
