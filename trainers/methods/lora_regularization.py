"""Dropout between the matrices of a LoRA, and the limit of its norm.

Source: kohya-ss/sd-scripts, ``networks/lora.py``: ``LoRAModule.forward`` and ``apply_max_norm_regularization``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamfleet.trainers.config.methods.whole_model import WholeModelConfig
from dreamfleet.trainers.models.adapters import adapted
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.models.lora import TRAINED


class HiddenDropout:
    """A forward hook of a LoRA's ``down`` matrix that drops parts of its output in training.

    With probability ``module`` the whole output, which leaves out the LoRA of the layer for the batch; each number with
    probability ``neuron``; each rank of each row with probability ``rank``. What remains is scaled up, except after
    ``module``. The random numbers are torch's, which a run seeds for each unit of a step.
    """

    def __init__(self, *, neuron: float, rank: float, module: float):
        self.neuron, self.rank, self.module = neuron, rank, module

    def __call__(self, down: nn.Module, inputs: Any, hidden: Tensor) -> Tensor:
        """Return ``hidden``, ``[N, T, R]`` or ``[N, R, H, W]``, with parts of it zero."""
        if not down.training:
            return hidden
        if self.module and float(torch.rand(1)) < self.module:
            return hidden * 0
        if self.neuron:
            hidden = F.dropout(hidden, self.neuron)
        if self.rank:
            axis = 1 if isinstance(down, nn.Conv2d) else hidden.ndim - 1
            shape = [size if place in (0, axis) else 1 for place, size in enumerate(hidden.shape)]
            kept = torch.rand(shape, device=hidden.device) > self.rank
            hidden = hidden * kept / (1 - self.rank)
        return hidden


def drop_hidden(model: DiffusionModel, config: WholeModelConfig) -> None:
    """Add the recipe's dropouts between the matrices to every trained LoRA of a model."""
    drop = HiddenDropout(neuron=config.neuron_dropout, rank=config.rank_dropout, module=config.module_dropout)
    if any((drop.neuron, drop.rank, drop.module)):
        for part in model.modules().values():
            for _, layer in adapted(part):
                layer.lora_A[TRAINED].register_forward_hook(drop)


@torch.no_grad()
def limit_norms(model: DiffusionModel, most: float) -> None:
    """Scale down the trained LoRAs whose change of a layer's weight has a Frobenius norm above ``most``.

    Both matrices are multiplied by the square root of the same factor. With ``most`` = 1 and the change D of a layer,
    D becomes ``D * min(1, 1 / |D|)``.
    """
    for part in model.modules().values():
        for _, layer in adapted(part):
            down, up = layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight
            wide, tall = down.flatten(1).float(), up.flatten(1).float()
            # |up @ down|^2 = trace(up^T up down down^T), from matrices of the size of the rank only.
            squared = ((tall.T @ tall) * (wide @ wide.T)).sum().clamp(min=0)
            norm = layer.scaling[TRAINED] * squared.sqrt()
            root = (most / norm.clamp(min=most)).sqrt()
            down.mul_(root)
            up.mul_(root)
