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


def build(params: list[dict[str, Any]], options: CameOptions) -> Came:
    """Return CAME for the parameter groups of a run."""
    return Came(params, options)


class Came(torch.optim.Optimizer):
    """CAME for float32 weights, without synchronisation with the device."""

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

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # closures are not supported
        """Step every parameter that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step(param, param.grad, group)

    def _step(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        factored = param.dim() > 1
        grad = grad.flatten(1) if factored else grad
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(grad)
            if factored:
                for name in ("exp_avg_sq", "exp_avg_res"):
                    state[f"{name}_row"] = grad.new_zeros(grad.shape[0])
                    state[f"{name}_col"] = grad.new_zeros(grad.shape[1])
            else:
                state["exp_avg_sq"] = torch.zeros_like(grad)
        state["step"] += 1
        beta1, beta2, beta3 = group["betas"]
        eps, deviation_eps = group["eps"]
        squared = grad.square().add_(eps)
        if factored:
            update = _damp(state, "exp_avg_sq", squared, beta2).mul_(grad)
        else:
            update = state["exp_avg_sq"].lerp_(squared, 1 - beta2).rsqrt().mul_(grad)
        del squared  # before another tensor of the same size is allocated
        clip_rms_(update, group["clip_threshold"])
        momentum = state["exp_avg"].lerp_(update, 1 - beta1)
        if factored:
            deviation = update.sub_(momentum).square_().add_(deviation_eps)
            update = _damp(state, "exp_avg_res", deviation, beta3).mul_(momentum)
        else:
            update = momentum
        if group["weight_decay"]:
            param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update.view_as(param), alpha=-group["lr"])


def _damp(state: dict[str, Tensor], name: str, squares: Tensor, beta: float) -> Tensor:
    """Move the row and column means of a state towards those of ``squares``; return their matrix's inverse root."""
    row = state[f"{name}_row"].lerp_(squares.mean(dim=1), 1 - beta)
    column = state[f"{name}_col"].lerp_(squares.mean(dim=0), 1 - beta)
    return factored_rsqrt(row, column)
