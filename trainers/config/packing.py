"""Decides which recipes can share a process and one copy of the frozen model. Does not import torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

from dreamfleet.trainers.config.engine import EngineConfig
from dreamfleet.trainers.config.engines import engine_name, engine_spec
from dreamfleet.trainers.config.method import MethodConfig
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.config.optimizer import OptimizerConfig
from dreamfleet.trainers.config.scaling import ScalingConfig
from dreamfleet.trainers.config.train import TrainConfig

#: Options of the engine that apply to the whole process or to the frozen weights.
SHARED_ENGINE_KEYS = ("allow_tf32", "cudnn_benchmark", "channels_last", "gpu_memory")
#: Options of the training that apply to the frozen weights or to a whole forward pass.
SHARED_TRAIN_KEYS = ("mixed_precision", "full_bf16", "gradient_checkpointing")


class PackedSections(Protocol):
    """The sections of a recipe that decide whether it can be packed."""

    @property
    def method(self) -> MethodConfig: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def engine(self) -> EngineConfig: ...
    @property
    def scaling(self) -> ScalingConfig: ...


def find_unpackable(recipe: PackedSections) -> str | None:
    """Return the reasons why a recipe cannot be trained together with others in one process; None if it can.

    The reasons name the recipe's keys with their values, separated by semicolons. ``engine.zero_stage: auto`` counts as
    the engine torch. Raises UserError for an engine that does not exist.
    """
    method, engine = recipe.method, recipe.engine
    spec = engine_spec(engine)
    found = [f"method.name: {method.name} {reason}"] if (reason := method.unpackable) else []
    settings = {
        f"{spec.setting(engine)} computes with an engine of its own": engine_name(engine) != "torch",
        f"scaling.num_workers: {recipe.scaling.words} is one training on several workers": (
            recipe.scaling.max_workers > 1
        ),
        "engine.torch_compile: true compiles the blocks for one training": engine.torch_compile,
        "train.profile_steps traces the steps of one training": recipe.train.profile_steps is not None,
        "optimizer.fused_backward: true steps inside the backward pass, which all trainings share": (
            recipe.optimizer.fused_backward
        ),
        "train.gradient_checkpointing: true recomputes the forward pass, which draws dropout again": (
            recipe.train.gradient_checkpointing and method.has_dropout
        ),
    }
    return "; ".join([*found, *(reason for reason, applies in settings.items() if applies)]) or None


def pack_key(recipe: PackedSections) -> Hashable:
    """Return what must be equal for recipes to share a process: the base model, precision and process-wide options.

    Methods, their options, data, batch sizes, schedules and optimizers may differ.
    """
    return (
        _freeze(recipe.model.model_dump(mode="json")),
        tuple(getattr(recipe.train, key) for key in SHARED_TRAIN_KEYS),
        tuple(getattr(recipe.engine, key) for key in SHARED_ENGINE_KEYS),
        recipe.scaling.use_gpu,
    )


def _freeze(value: object) -> Hashable:
    """Return a plain tree as nested tuples."""
    if isinstance(value, dict):
        return tuple((key, _freeze(entry)) for key, entry in sorted(value.items()))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(map(_freeze, value))
    assert isinstance(value, Hashable)
    return value
