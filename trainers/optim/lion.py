"""Lion: every weight moves by the learning rate, in the direction of the sign of an interpolated momentum.

Source: Chen et al. 2023 (arXiv 2302.06675), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dreamfleet.trainers.config.builtin_optimizers import LionOptions
from dreamfleet.trainers.optim.param_group import split_by_size
from dreamfleet.trainers.optim.weight_optimizer import WeightOptimizer


def build(params: list[dict[str, Any]], options: LionOptions) -> Lion:
    """Return Lion for the parameter groups of a run."""
    return Lion(params, lr=0.0, betas=options.betas, weight_decay=options.weight_decay or 0.0)


class Lion(WeightOptimizer):
    """Lion with decoupled weight decay. The state is one momentum per weight, in the weight's dtype.

    Small weights are stepped together, so that the intermediate update takes no more memory than the largest weight.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def new_state(self, param: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(param, requires_grad=False)}

    def step_weights(self, params: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        for part in split_by_size(params):
            self._step_part(part, group)

    def _step_part(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        weights: list[Tensor] = list(params)
        gradients = [param.grad for param in params if param.grad is not None]
        momenta = [self.state[param]["exp_avg"] for param in params]
        beta1, beta2 = group["betas"]
        updates = torch._foreach_mul(momenta, beta1)
        torch._foreach_add_(updates, gradients, alpha=1 - beta1)
        torch._foreach_sign_(updates)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-group["lr"])
        torch._foreach_lerp_(momenta, gradients, 1 - beta2)
