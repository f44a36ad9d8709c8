"""The LoRA matrices of several members as one tensor for each layer, filled before a pass and emptied after it.

Copying all matrices with a few multi-tensor kernels, and reading one gradient for each layer, costs less than stacking
the matrices in every layer: with 32 members, a stack and its backward pass take one kernel for each matrix of each
member.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dreamfleet.trainers.models.lora import TRAINED
from dreamfleet.trainers.packing.member import Member

Place = tuple[str, str]  # a part of the model, and the name of a layer in it


class Stacked(NamedTuple):
    """The matrices of K adapters of one layer, with smaller ranks padded by zeros.

    ``down`` is ``[K, R, I]`` (of convolutions ``[K, R, I, kH, kW]``), ``up`` ``[K, O, R]`` (``[K, O, R, 1, 1]``), and
    ``scale`` ``[K]``. ``numbers``: the members that adapt the layer, by their position in the pass.
    """

    down: Tensor
    up: Tensor
    scale: Tensor
    numbers: tuple[int, ...]


class AdapterBank:
    """The adapters of the members of a pass, by layer.

    :meth:`fill` copies the parameters into the bank, and :meth:`empty` adds the gradients to the parameters.
    """

    def __init__(self, members: Sequence[Member]):
        self._layers: dict[Place, Stacked] = {}
        self._params: dict[Place, list[tuple[nn.Parameter, nn.Parameter]]] = {}
        sources, views = list[Tensor](), list[Tensor]()
        for place in dict.fromkeys(place for member in members for place in member.adapters):
            numbers = tuple(k for k, member in enumerate(members) if place in member.adapters)
            layers: list[Any] = [members[k].adapters[place] for k in numbers]
            pairs = [(layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight) for layer in layers]
            down, up = _padded([down for down, _ in pairs], 0), _padded([up for _, up in pairs], 1)
            scales = [layer.scaling[TRAINED] for layer in layers]
            scale = torch.tensor(scales, dtype=down.dtype, device=down.device)
            self._layers[place], self._params[place] = Stacked(down, up, scale, numbers), pairs
            for k, pair in enumerate(pairs):
                sources += pair
                views += [down[k, : len(pair[0])], up[k, :, : pair[1].shape[1]]]
        self._sources, self._views = sources, views

    @torch.no_grad()
    def fill(self) -> None:
        """Copy the members' parameters into new leaves of the autograd graph, which share the bank's memory."""
        if self._views:
            torch._foreach_copy_(self._views, [source.detach() for source in self._sources])
        for place, layer in self._layers.items():
            down, up = (tensor.detach().requires_grad_() for tensor in (layer.down, layer.up))
            self._layers[place] = layer._replace(down=down, up=up)

    def layer(self, place: Place) -> Stacked | None:
        """Return the matrices of one layer; None if no member adapts it."""
        return self._layers.get(place)

    @torch.no_grad()
    def empty(self) -> None:
        """Add the gradients of the pass to those of the members' parameters."""
        for place, (down, up, _, _) in self._layers.items():
            pairs = self._params[place]
            if down.grad is not None:
                for (param, _), gradient in zip(pairs, down.grad.unbind(), strict=True):
                    _add_gradient(param, gradient[: len(param)])
            if up.grad is not None:
                for (_, param), gradient in zip(pairs, up.grad.unbind(), strict=True):
                    _add_gradient(param, gradient[:, : param.shape[1]])


def _padded(weights: Sequence[Tensor], dim: int) -> Tensor:
    """Return zeros for K weights that differ only in the size of ``dim``: ``[K, ...]``, with its largest size."""
    shape = list(weights[0].shape)
    shape[dim] = max(weight.shape[dim] for weight in weights)
    return weights[0].new_zeros((len(weights), *shape))


def _add_gradient(param: nn.Parameter, gradient: Tensor) -> None:
    gradient = gradient.contiguous()  # a copy only where ranks are padded
    param.grad = gradient if param.grad is None else param.grad + gradient
