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
from dreamfleet.trainers.optim.weight_optimizer import WeightOptimizer, as_matrix

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


class Adafactor(WeightOptimizer):
    """Adafactor for float32 weights.

    A tensor of more than two dimensions is reshaped to ``[first, rest]``. Factored over the last two dimensions, as in
    other implementations, a 3 x 3 convolution would store two thirds of its moments.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def new_state(self, param: Tensor) -> dict[str, Tensor]:
        matrix = as_matrix(param)
        if matrix.dim() < 2:
            return {"exp_avg_sq": torch.zeros_like(matrix)}
        rows, columns = matrix.shape
        return {"exp_avg_sq_row": matrix.new_zeros(rows), "exp_avg_sq_col": matrix.new_zeros(columns)}

    def make_update(self, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        gradient = as_matrix(gradient)
        fresh = float(state["step"]) ** DECAY
        squared = gradient.square().add_(EPSILON)
        if gradient.dim() > 1:
            row = state["exp_avg_sq_row"].lerp_(squared.mean(dim=1), fresh)
            column = state["exp_avg_sq_col"].lerp_(squared.mean(dim=0), fresh)
            del squared  # before the update of the same size is allocated
            update = factored_rsqrt(row, column).mul_(gradient)
        else:
            update = state["exp_avg_sq"].lerp_(squared, fresh).rsqrt().mul_(gradient)
        clip_rms_(update, CLIP_THRESHOLD)
        return update
