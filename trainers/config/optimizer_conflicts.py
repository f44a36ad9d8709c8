"""Checks the optimizer of a recipe: its own options, and the engine settings that it does not support."""

from __future__ import annotations

from pydantic import ValidationError

from dreamfleet.trainers.config.engine import EngineConfig
from dreamfleet.trainers.config.engines import engine_name, engine_spec
from dreamfleet.trainers.config.method import MethodConfig
from dreamfleet.trainers.config.optimizer import OptimizerConfig
from dreamfleet.trainers.config.optimizers import sharded_names
from dreamfleet.trainers.config.validation_errors import explain


def find_optimizer_conflicts(
    optimizer: OptimizerConfig, engine: EngineConfig, method: MethodConfig
) -> list[str]:
    """Return an error for each wrong option of the optimizer, and for each setting that it does not support."""
    kind, setting = optimizer.kind, f"optimizer.name: {optimizer.name}"
    try:
        optimizer.own_options()
    except ValidationError as error:
        return explain(error, kind.Options, homes={}, prefix="optimizer.options")
    found = []
    if optimizer.fused_backward and not kind.steps_alone:
        found.append(
            f"{setting} steps all weights of a part together, and optimizer.fused_backward each for itself; set "
            "fused_backward: false"
        )
    if engine.channels_last and not kind.keeps_layout:
        found.append(
            f"engine.channels_last cannot be combined with {setting}, whose first step changes the memory format of "
            "every weight; set channels_last: false, or use adamw"
        )
    if kind.average is not None and getattr(method, "scale_weight_norms", None) is not None:
        found.append(
            f"{setting} averages the weights, and method.scale_weight_norms would limit the trained ones only; leave "
            "scale_weight_norms out"
        )
    if engine_name(engine) == "zero":
        by = engine_spec(engine).setting(engine)
        if not kind.moments:
            found.append(
                f"{setting} does not go with {by}: DeepSpeed shards the states of {' and '.join(sharded_names())}; use "
                "one of them, or engine.zero_stage: auto, which trains on any number of GPUs with the engine torch"
            )
        elif engine.offload_optimizer_device != "none" and not kind.offloads:
            found.append(
                f"{setting} does not go with engine.offload_optimizer_device: {engine.offload_optimizer_device}, which "
                "steps with DeepSpeed's AdamW in host memory; set it to none (stages 0 to 3 work), or use adamw"
            )
    return found
