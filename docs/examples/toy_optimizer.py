"""An optimizer from outside the package: torch's NAdam."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field

from dreamfleet.trainers.config.optimizers import OPTIMIZERS, Optimizer, OptimizerOptions


class NadamOptions(OptimizerOptions):
    """The keys of ``optimizer.options``, besides ``weight_decay``."""

    momentum_decay: float = Field(4e-3, ge=0, description="how fast the momentum approaches its final value")


def build(params: list[dict[str, Any]], options: NadamOptions) -> Any:
    """Return the optimizer; the engine sets the learning rate of each group before every step."""
    import torch

    return torch.optim.NAdam(params, lr=0.0, decoupled_weight_decay=True, **options.model_dump())


NADAM = Optimizer(
    "AdamW with Nesterov momentum, of torch",
    build=build,
    # Bytes of a weight's states: two moments in float32, and two numbers.
    state_bytes=lambda shape, options: 8 * math.prod(shape) + 8,
    Options=NadamOptions,
)


if __name__ == "__main__":  # in a script or a notebook; an installed package uses an entry point instead
    OPTIMIZERS.register("nadam")(NADAM)
