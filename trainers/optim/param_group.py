"""Trainable parameters that share a learning rate."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class ParamGroup(NamedTuple):
    """Trainable parameters under one name; ``scale`` multiplies the recipe's learning rate."""

    name: str
    params: dict[str, nn.Parameter]
    scale: float = 1.0
