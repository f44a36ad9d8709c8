"""The ways to run an engine that a plan weighs, cheapest first, and what each sends between GPU and host."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineChoice:
    """One way to run the engine; ``zero_stage`` None is torch alone (with DDP when there are several workers).

    ``nvme``: what is offloaded of the optimizer lies on a disk. ``optimizer``, ``fused_backward`` and ``bf16_weights``
    are what it takes besides the recipe's own settings: they change what is trained, so nobody but the user chooses
    them.
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
        """Whether a run under it would not be the recipe's: no clipping, another optimizer, narrower weights."""
        return self.fused_backward or self.bf16_weights or self.optimizer is not None

    @property
    def settings(self) -> dict[str, str | int | bool]:
        """The recipe's keys that make this choice."""
        if self.zero_stage is not None:
            told: dict[str, str | int | bool] = {"engine.zero_stage": self.zero_stage}
            if self.offload_optimizer:
                told["engine.offload_optimizer_device"] = "nvme" if self.nvme else "cpu"
            if self.offload_param:
                told["engine.offload_param_device"] = "cpu"
            return told
        told = {"engine.zero_stage": "auto"}
        if self.optimizer is not None:
            told["optimizer.name"] = self.optimizer
        if self.fused_backward:
            told |= {"optimizer.fused_backward": True, "optimizer.max_grad_norm": 0}
        if self.bf16_weights:
            told |= {"train.mixed_precision": "bf16", "train.full_bf16": True}
        return told


#: From the cheapest in time per step to the dearest, in the order of Hugging Face's DeepSpeed guide ("ZeRO": stage 1,
#: 2, 2 with offload, 3, 3 with offload): stage 3 sends the weights in every pass, offload moves states over PCIe and
#: steps on the CPU. Weights alone on the host are for runs that learn little of a large model. Stage 0 shards nothing
#: and only goes through another library, so it follows plain torch; stage 1 with offload is left out, as stage 2 sends
#: as much and holds less.
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
#: Open where the recipe names a disk for it.
NVME_CHOICES = (
    EngineChoice(
        "ZeRO-3, optimizer on NVMe, weights on host", 3, offload_optimizer=True, offload_param=True, nvme=True
    ),
)
#: For one GPU, without offload: told beside the others, never chosen unasked.
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


def tell_settings(choice: EngineChoice) -> str:
    """Write a choice as overrides of a recipe."""
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in choice.settings.items()
    )
