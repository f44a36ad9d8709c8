"""CAME: Adafactor with a momentum that is damped where the updates deviate from it.

Source: Luo et al. 2023 (arXiv 2307.02047), algorithm 2. As in our Adafactor, a tensor of more than two dimensions is
reshaped to ``[first, rest]``; factored over its last two dimensions, a 3 x 3 convolution would store more than AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dreamfleet.trainers.config.builtin_optimizers import CameOptions
from dreamfleet.trainers.optim.adafactor import clip_rms_, factored_rsqrt
from dreamfleet.trainers.optim.weight_optimizer import WeightOptimizer, as_matrix


def build(params: list[dict[str, Any]], options: CameOptions) -> Came:
    """Return CAME for the parameter groups of a run."""
    return Came(params, options)


class Came(WeightOptimizer):
    """CAME for float32 weights."""

    def __init__(self, params: Iterable[Any], options: CameOptions):
        super().__init__(
            params,
            {
                "lr": 0.0,
                "betas": options.betas,
                "eps": options.eps,
                "clip_threshold": options.clip_threshold,
                "weight_decay": options.weight_decay or 0.0,
            },
        )

    def new_state(self, param: Tensor) -> dict[str, Tensor]:
        matrix = as_matrix(param)
        state = {"exp_avg": torch.zeros_like(matrix)}
        if matrix.dim() < 2:
            return state | {"exp_avg_sq": torch.zeros_like(matrix)}
        rows, columns = matrix.shape
        for name in ("exp_avg_sq", "exp_avg_res"):
            state |= {f"{name}_row": matrix.new_zeros(rows), f"{name}_col": matrix.new_zeros(columns)}
        return state

    def make_update(self, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        gradient = as_matrix(gradient)
        factored = gradient.dim() > 1
        beta1, beta2, beta3 = group["betas"]
        eps, deviation_eps = group["eps"]
        squared = gradient.square().add_(eps)
        if factored:
            update = _damp(state, "exp_avg_sq", squared, beta2).mul_(gradient)
        else:
            update = state["exp_avg_sq"].lerp_(squared, 1 - beta2).rsqrt().mul_(gradient)
        del squared  # before another tensor of the same size is allocated
        clip_rms_(update, group["clip_threshold"])
        momentum = state["exp_avg"].lerp_(update, 1 - beta1)
        if not factored:
            return momentum
        deviation = update.sub_(momentum).square_().add_(deviation_eps)
        return _damp(state, "exp_avg_res", deviation, beta3).mul_(momentum)


def _damp(state: dict[str, Tensor], name: str, squares: Tensor, beta: float) -> Tensor:
    """Move the row and column means of a state towards those of ``squares``; return their matrix's inverse root."""
    row = state[f"{name}_row"].lerp_(squares.mean(dim=1), 1 - beta)
    column = state[f"{name}_col"].lerp_(squares.mean(dim=0), 1 - beta)
    return factored_rsqrt(row, column)
