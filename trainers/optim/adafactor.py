"""Adafactor with an external learning rate: second moments of a matrix are stored as row and column means.

Source: Shazeer & Stern 2018 (arXiv 1804.04235), algorithm 4 with the recipe's learning rate in place of the relative
one, no first moment, and update clipping at 1; kohya's options relative_step=False scale_parameter=False.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dreamfleet.trainers.config.builtin_optimizers import AdafactorOptions

EPSILON = 1e-30  # added to squared gradients
CLIP_THRESHOLD = 1.0  # maximum root mean square of an update
DECAY = -0.8  # of the second moments: 1 - step ** DECAY


def build(params: list[dict[str, Any]], options: AdafactorOptions) -> Adafactor:
    """Return Adafactor for the parameter groups of a run."""
    return Adafactor(params, lr=0.0, weight_decay=options.weight_decay or 0.0)


def factored_rsqrt(row: Tensor, column: Tensor) -> Tensor:
    """Return the inverse root ``[R, C]`` of the matrix whose means along its rows and columns are given."""
    return (row / row.mean()).rsqrt_()[:, None] * column.rsqrt()[None]


def clip_rms_(update: Tensor, threshold: float) -> None:
    """Scale a tensor in place so that its root mean square is at most ``threshold``."""
    rms = torch.linalg.vector_norm(update) / update.numel() ** 0.5
    update.div_((rms / threshold).clamp_(min=1.0))


class Adafactor(torch.optim.Optimizer):
    """Adafactor for float32 weights, without synchronisation with the device.

    A tensor of more than two dimensions is reshaped to ``[first, rest]``. Factored over the last two dimensions, as in
    other implementations, a 3 x 3 convolution would store two thirds of its moments.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

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
            if factored:
                state["exp_avg_sq_row"] = grad.new_zeros(grad.shape[0])
                state["exp_avg_sq_col"] = grad.new_zeros(grad.shape[1])
            else:
                state["exp_avg_sq"] = torch.zeros_like(grad)
        state["step"] += 1
        fresh = float(state["step"]) ** DECAY  # on the host, as in torch's own optimizers
        squared = grad.square().add_(EPSILON)
        if factored:
            row = state["exp_avg_sq_row"].lerp_(squared.mean(dim=1), fresh)
            column = state["exp_avg_sq_col"].lerp_(squared.mean(dim=0), fresh)
            del squared  # before the update of the same size is allocated
            update = factored_rsqrt(row, column).mul_(grad)
        else:
            update = state["exp_avg_sq"].lerp_(squared, fresh).rsqrt().mul_(grad)
        clip_rms_(update, CLIP_THRESHOLD)
        if group["weight_decay"]:
            param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update.view_as(param), alpha=-group["lr"])
