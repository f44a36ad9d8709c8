"""Exponential moving average of the trainable weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dreamfleet.datasets.errors import CheckpointError


class Ema:
    """Moving average of the trainable weights in float32, with the warm-up of diffusers' EMAModel."""

    def __init__(self, params: Mapping[str, Tensor], decay: float):
        self.decay = decay
        self.shadow = {name: param.detach().float().clone() for name, param in params.items()}

    @torch.no_grad()
    def update(self, params: Mapping[str, Tensor], step: int) -> None:
        """Move the average towards the weights after optimizer step ``step`` (from 1)."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        if all(param.dtype == torch.float32 for param in params.values()):
            torch._foreach_lerp_(list(self.shadow.values()), [p.detach() for p in params.values()], weight)
            return
        for shadow, param in zip(self.shadow.values(), params.values(), strict=True):
            shadow.lerp_(param.detach().float(), weight)  # one float32 copy at a time


def saved_average(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the averaged weights of an engine's saved state. Raises CheckpointError if it has none."""
    if "ema" not in state:
        raise CheckpointError("engine.use_ema is on, but the checkpoint was saved without an average")
    return state["ema"]
