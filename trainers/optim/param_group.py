"""Trainable parameters that share a learning rate."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
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


def split_by_size(params: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Split parameters in order into parts of one type and device, none larger than the largest parameter."""
    parts: list[list[nn.Parameter]] = []
    params = list(params)
    most, size = max((param.numel() for param in params), default=0), 0
    for _, alike in itertools.groupby(params, key=lambda param: (param.dtype, param.device)):
        part: list[nn.Parameter] = []
        for param in alike:
            if not part or size + param.numel() > most:
                parts.append(part := [])
                size = 0
            part.append(param)
            size += param.numel()
    return parts
