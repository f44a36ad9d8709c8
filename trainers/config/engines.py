"""The registry of engines, the engine that a recipe selects, and what each engine supports. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from dreamfleet.datasets.config_base import Section
from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.registry import Registry
from dreamfleet.trainers.config.engine import EngineConfig


class EngineSpec:
    """Describes what an engine supports, without importing torch. Every engine class derives from it.

    The class methods take the recipe's ``engine:`` section, because the result may depend on it. The defaults describe
    an engine that supports all options of a recipe.
    """

    #: A section with the keys of ``engine.options``; by default there are none.
    Options: ClassVar[type[Section]] = Section
    #: The reason why ``dreamfleet plan`` cannot estimate the memory of a run; None if it can.
    no_plan: ClassVar[str | None] = "computes in a way that the memory plan does not model"
    #: Whether each worker needs a whole GPU, because workers that share one use gloo, which lacks some operations.
    needs_whole_gpu: ClassVar[bool] = False

    @classmethod
    def refused(cls, config: EngineConfig) -> Mapping[str, str]:
        """Return the recipe keys that must keep their defaults with this engine: key -> reason."""
        return {}

    @classmethod
    def shares_process(cls, config: EngineConfig) -> bool:
        """Return whether successive trials of a search may share a process."""
        return False

    @classmethod
    def summary(cls, config: EngineConfig) -> str:
        """Return a short description of the engine and its main settings, for reports and logs."""
        return config.name

    @classmethod
    def setting(cls, config: EngineConfig) -> str:
        """Return the recipe's key and value that select this engine, for error messages."""
        return f"engine.name: {config.name}"


class TorchSpec(EngineSpec):
    """Describes the engine that uses only torch, on a single device or on one per worker."""

    no_plan = None

    @classmethod
    def shares_process(cls, config: EngineConfig) -> bool:
        return not config.torch_compile  # compiled blocks keep memory

    @classmethod
    def summary(cls, config: EngineConfig) -> str:
        return "torch"


class ZeroSpec(EngineSpec):
    """Describes the DeepSpeed ZeRO engine, which shards optimizer states, gradients and weights over the workers."""

    no_plan = None
    needs_whole_gpu = True

    @classmethod
    def refused(cls, config: EngineConfig) -> Mapping[str, str]:
        refused = {
            "engine.gradient_exchange": "which sums gradients in DeepSpeed's own way",
            "optimizer.fused_backward": "which steps after the whole backward pass",
            "train.full_bf16": "whose stages keep float32 weights in the optimizer and compute in 16 bits anyway",
        }
        if config.zero_stage != 0:
            refused["engine.channels_last"] = "which stores the weights in flat buffers"
        if config.zero_stage == 3:
            refused["engine.torch_compile"] = "which gathers and releases weights between the blocks"
        return refused

    @classmethod
    def summary(cls, config: EngineConfig) -> str:
        offloaded = {"optimizer": config.offload_optimizer_device, "weights": config.offload_param_device}
        parts = [f"{what} on {device}" for what, device in offloaded.items() if device != "none"]
        return ", ".join([f"ZeRO-{config.zero_stage}", *parts])

    @classmethod
    def setting(cls, config: EngineConfig) -> str:
        return "engine.deepspeed_config" if config.is_auto else f"engine.zero_stage: {config.zero_stage}"


#: Engine classes by name; an installed package adds one through the entry-point group ``dreamfleet.engines``.
ENGINES: Registry[type[EngineSpec]] = Registry(
    "engine",
    group="dreamfleet.engines",
    builtin={
        "torch": "dreamfleet.trainers.engines.torch_engine:TorchEngine",
        "zero": "dreamfleet.trainers.engines.zero_engine:ZeroEngine",
    },
)


def engine_name(config: EngineConfig) -> str:
    """Return the name of the engine that a recipe selects.

    ``engine.name: auto`` means ``zero`` if a ZeRO stage or a DeepSpeed file is given, otherwise ``torch``. On GPUs,
    ``settle_engine`` may later select ``zero`` from the memory plan.
    """
    if config.name != "auto":
        return config.name
    return "torch" if config.zero_stage == "auto" and config.deepspeed_config is None else "zero"


def engine_spec(config: EngineConfig) -> type[EngineSpec]:
    """Return the description of the engine that a recipe selects; only engines of other packages may import torch.

    Raises UserError for an unknown engine.
    """
    name = engine_name(config)
    found: Any = {"torch": TorchSpec, "zero": ZeroSpec}.get(name) or ENGINES.get(name)
    if not (isinstance(found, type) and issubclass(found, EngineSpec)):
        raise UserError(f"{name} is {found!r}, which is no subclass of trainers.engines.base.Engine")
    return found


def find_refused(sections: Mapping[str, Any], reasons: Mapping[str, str], *, by: str) -> list[str]:
    """Return an error for each ``section.key`` in ``reasons`` that is not at its default in ``sections``."""
    found = []
    for path, reason in reasons.items():
        name, _, key = path.partition(".")
        if (section := sections.get(name)) is None:
            continue
        default = type(section).model_fields[key].get_default(call_default_factory=True)
        if (value := getattr(section, key)) != default:
            found.append(f"{path}: {value} does not go with {by}, {reason}; leave it out")
    return found
