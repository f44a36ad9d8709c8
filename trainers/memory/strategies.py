"""The engine choices that a memory plan compares, cheapest first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineChoice:
    """One engine with its settings; ``zero_stage`` None is plain torch (with DDP for several workers).

    ``nvme``: offloaded optimizer states are on a disk. ``optimizer``, ``fused_backward`` and ``bf16_weights``
    change settings of the recipe and thereby the training, so these choices are shown, but never chosen
    automatically.
    """

    name: str
    zero_stage: int | None = None
    offload_optimizer: bool = False
    offload_param: bool = False
    nvme: bool = False
    optimizer: str | None = None
    fused_backward: bool = False
    bf16_weights: bool = False

    @property
    def engine(self) -> str:
        """The name of the engine."""
        return "torch" if self.zero_stage is None else "zero"

    @property
    def alters(self) -> bool:
        """Whether the choice changes the training: no clipping, another optimizer, weights in bfloat16."""
        return self.fused_backward or self.bf16_weights or self.optimizer is not None

    @property
    def settings(self) -> dict[str, str | int | bool]:
        """The recipe keys that select this choice, and their values."""
        if self.zero_stage is not None:
            settings: dict[str, str | int | bool] = {"engine.zero_stage": self.zero_stage}
            if self.offload_optimizer:
                settings["engine.offload_optimizer_device"] = "nvme" if self.nvme else "cpu"
            if self.offload_param:
                settings["engine.offload_param_device"] = "cpu"
            return settings
        settings = {"engine.zero_stage": "auto"}
        if self.optimizer is not None:
            settings["optimizer.name"] = self.optimizer
        if self.fused_backward:
            settings |= {"optimizer.fused_backward": True, "optimizer.max_grad_norm": 0}
        if self.bf16_weights:
            settings |= {"train.mixed_precision": "bf16", "train.full_bf16": True}
        return settings


#: From the fastest step to the slowest, in the order of Hugging Face's DeepSpeed guide ("ZeRO": stage 1, 2, 2 with
#: offload, 3, 3 with offload): stage 3 gathers the weights in every pass, offload moves states over PCIe and steps on
#: the CPU. Offload of weights alone suits runs that train a small part of a large model. Stage 0 shards
#: nothing, so it follows plain torch. Stage 1 with offload is omitted, as stage 2 transfers as much and uses
#: less memory.
CHOICES = (
    EngineChoice("torch"),
    EngineChoice("ZeRO-0", 0),
    EngineChoice("ZeRO-1", 1),
    EngineChoice("ZeRO-2", 2),
    EngineChoice("ZeRO-2, optimizer on host", 2, offload_optimizer=True),
    EngineChoice("ZeRO-3", 3),
    EngineChoice("ZeRO-3, weights on host", 3, offload_param=True),
    EngineChoice("ZeRO-3, optimizer on host", 3, offload_optimizer=True),
    EngineChoice("ZeRO-3, optimizer and weights on host", 3, offload_optimizer=True, offload_param=True),
)
#: Added where the recipe sets ``engine.nvme_path``.
NVME_CHOICES = (
    EngineChoice(
        "ZeRO-3, optimizer on NVMe, weights on host", 3, offload_optimizer=True, offload_param=True, nvme=True
    ),
)
#: For one GPU, without offload: shown beside the others, never chosen automatically.
ALTERING = (
    EngineChoice("torch, fused backward", fused_backward=True),
    EngineChoice("torch, fused backward, Adafactor", optimizer="adafactor", fused_backward=True),
    EngineChoice(
        "torch, fused backward, Adafactor, bf16 weights",
        optimizer="adafactor",
        fused_backward=True,
        bf16_weights=True,
    ),
)


def format_overrides(choice: EngineChoice) -> str:
    """Return the settings of a choice as overrides for the command line."""
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in choice.settings.items()
    )
