"""Trainable parameters that share a learning rate."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class ParamGroup(NamedTuple):
    """Trainable parameters under one name; ``scale`` multiplies the recipe's learning rate.

    ``rates_of``: the name whose learning rate in the recipe is used; None: the group's own. ``rate``: a learning rate
    that replaces it.
    """

    name: str
    params: dict[str, nn.Parameter]
    scale: float = 1.0
    rates_of: str | None = None
    rate: float | None = None
