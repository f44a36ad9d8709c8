"""Layers of a shared model that apply each member's own words, adapters and hypernetworks to its own rows.

The frozen layer is computed once for all rows. Members' additions of equal shape are computed together: the matrices of
K members are stacked, smaller ranks padded with zeros, and applied by batched products (LoRA) or grouped convolutions
(LoCon). The idea is that of PLoRA and mLoRA for language models (docs/packing.md).

Shape suffixes: N rows, K members, R rank, I and O input and output features, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamfleet.trainers.config.hypernetwork_structure import BATCH_ACTIVATIONS
from dreamfleet.trainers.models.lora import TRAINED
from dreamfleet.trainers.models.stable_diffusion.hypernetwork import HypernetworkModule
from dreamfleet.trainers.packing.adapter_bank import Place, Stacked
from dreamfleet.trainers.packing.member import Current, Member

# Activations that mix the images of a batch or draw random numbers.
NOT_STACKED = {*BATCH_ACTIVATIONS, "rrelu"}


class PackedEmbedding(nn.Module):
    """A token table in which ids from ``vocab_size`` on refer to the learned vectors of the row's member.

    ``side``: the number of the text encoder that the table belongs to.
    """

    def __init__(self, table: nn.Embedding, current: Current, side: int):
        super().__init__()
        self.table, self.side = table, side
        self._current = current

    @property
    def weight(self) -> Tensor:
        """The unchanged token table ``[vocab_size, D]``."""
        return self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the vectors ``[N, T, D]`` of ids ``[N, T]``, each id in the numbering of its member."""
        vocab = self.table.num_embeddings
        is_learned_NT = input_ids >= vocab
        base_NTD = self.table(input_ids.masked_fill(is_learned_NT, 0))
        vectors, found = list[Tensor](), list[Tensor]()
        for member, ids in zip(
            self._current.rows.members, self._current.rows.split(input_ids - vocab), strict=True
        ):
            words = list(member.tables[self.side].words.values()) if member.tables else []
            if words:
                # Each id is looked up among its own member's vectors; other tokens get the first one, which is unused.
                found.append(ids.clamp(min=0) + sum(len(one) for one in vectors))
                vectors += words
            else:
                found.append(torch.zeros_like(ids))
        if not vectors:
            return base_NTD
        learned_NTD = torch.cat(vectors)[torch.cat(found)].to(base_NTD.dtype)
        return torch.where(is_learned_NT[..., None], learned_NTD, base_NTD)


class PackedAdapter(nn.Module):
    """A frozen linear or convolution layer that adds each member's LoRA to its rows.

    ``place``: the part of the model and the name of the layer in it. ``bank`` returns the matrices of the pass.
    """

    def __init__(
        self, base: nn.Module, current: Current, place: Place, bank: Callable[[Place], Stacked | None]
    ):
        super().__init__()
        self.base = base
        self._current, self._place, self._bank = current, place, bank

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)  # such as weight and in_features

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output ``[N, ...]``, with LoRA for the rows of members that adapt this layer."""
        output = self.base(inputs, *args, **kwargs)
        stacked, rows = self._bank(self._place), self._current.rows
        if stacked is None:
            return output
        inputs = self._dropped(inputs)
        if rows.is_even and stacked.numbers == rows.numbers:
            return (output + _changes(stacked, inputs, self.base)).to(output.dtype)
        given, parts = rows.split(inputs), rows.split(output)
        index = {number: k for k, number in enumerate(stacked.numbers)}
        for count in sorted(set(rows.counts)):
            chosen = [
                k for k, number in enumerate(rows.numbers) if rows.counts[k] == count and number in index
            ]
            if not chosen:
                continue
            own = [index[rows.numbers[k]] for k in chosen]
            some = Stacked(stacked.down[own], stacked.up[own], stacked.scale[own], ())
            changes = _changes(some, torch.cat([given[k] for k in chosen]), self.base)
            for k, change in zip(chosen, changes.chunk(len(chosen)), strict=True):
                parts[k] = (parts[k] + change).to(output.dtype)
        return torch.cat(parts)

    def _dropped(self, inputs: Tensor) -> Tensor:
        """Apply each member's dropout, with its own random numbers, to its rows."""
        rows = self._current.rows
        if not any(member.has_dropout for member in rows.members):
            return inputs
        parts = rows.split(inputs)
        for k, member in enumerate(rows.members):
            if member.has_dropout and (layer := member.adapters.get(self._place)) is not None:
                with member.drawing():  # in eval mode, its layer draws and changes nothing
                    parts[k] = layer.lora_dropout[TRAINED](parts[k])
        return torch.cat(parts)


class PackedHypernetworks:
    """The hypernetworks of all members, with the interface of one :class:`Hypernetwork`."""

    def __init__(self, current: Current):
        self._current = current

    def keys(self, context: Tensor, multiplier: float = 1.0) -> Tensor:
        """Return the input of the key projection ``[N, T, D]``, changed for each row by its member."""
        return self._change(0, context)

    def values(self, context: Tensor, multiplier: float = 1.0) -> Tensor:
        """Return the input of the value projection ``[N, T, D]``, changed for each row by its member."""
        return self._change(1, context)

    def _change(self, which: int, context: Tensor) -> Tensor:
        rows, width = self._current.rows, str(context.shape[-1])
        parts = rows.split(context)
        alike: dict[Any, list[int]] = {}
        for k, member in enumerate(rows.members):
            if _can_stack(member, width):
                network, multiplier = member.networks[0]
                alike.setdefault((network.structure, rows.counts[k], multiplier), []).append(k)
                continue
            for network, multiplier in member.networks:
                if width in network.layers:
                    with member.drawing():
                        parts[k] = (network.keys, network.values)[which](parts[k], multiplier)
        for (_, _, multiplier), chosen in alike.items():
            if len(chosen) == 1:
                network = rows.members[chosen[0]].networks[0][0]
                parts[chosen[0]] = (network.keys, network.values)[which](parts[chosen[0]], multiplier)
                continue
            pairs: list[Any] = [rows.members[k].networks[0][0].layers[width] for k in chosen]
            modules = [pair[which] for pair in pairs]
            weights = self._stacked((which, width, *chosen), modules)
            changed = _run_alike(modules[0], weights, torch.stack([parts[k] for k in chosen]), multiplier)
            for k, part in zip(chosen, changed, strict=True):
                parts[k] = part
        return torch.cat(parts)

    def _stacked(self, key: Any, modules: Sequence[nn.Module]) -> dict[str, Tensor]:
        cache = self._current.rows.cache
        if cache is not None and key in cache:
            return cache[key]
        each = [dict(module.named_parameters()) for module in modules]
        stacked = {name: torch.stack([params[name] for params in each]) for name in each[0]}
        if cache is not None:
            cache[key] = stacked
        return stacked


def _can_stack(member: Member, width: str) -> bool:
    """Return whether a member has one MLP for this width that draws no random numbers and mixes no rows."""
    if len(member.networks) != 1 or width not in member.networks[0][0].layers:
        return False
    structure = member.networks[0][0].structure
    return not any(structure.dropout_structure) and structure.activation_func not in NOT_STACKED


def _run_alike(
    module: HypernetworkModule, weights: dict[str, Tensor], contexts: Tensor, multiplier: float
) -> Tensor:
    """Apply K modules of the structure of ``module``, with ``weights`` ``[K, ...]``, to contexts ``[K, N, T, D]``."""

    def one(params: dict[str, Tensor], context: Tensor) -> Tensor:
        return torch.func.functional_call(module, params, (context, multiplier))

    return torch.func.vmap(one)(weights, contexts)


def _changes(stacked: Stacked, inputs: Tensor, base: nn.Module) -> Tensor:
    """Return what K adapters add to the output of their layer: ``[N, ...]``; each has N / K consecutive rows."""
    down, up, scale, _ = stacked
    if not torch.is_autocast_enabled(inputs.device.type):
        inputs = inputs.to(down.dtype)
    if isinstance(base, nn.Conv2d):
        return _convolve(base, inputs, down, up, scale)
    flat_KNI = inputs.reshape(len(down), -1, inputs.shape[-1])
    hidden_KNR = torch.bmm(flat_KNI, down.transpose(1, 2))
    hidden_KNR = hidden_KNR * scale.to(hidden_KNR.dtype)[:, None, None]
    return torch.bmm(hidden_KNR, up.transpose(1, 2)).reshape(*inputs.shape[:-1], -1)


def _convolve(like: nn.Conv2d, inputs: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """Return the outputs ``[K n, O, H, W]`` of K pairs of convolutions with the stride and padding of ``like``."""
    num = len(down)
    # Grouped convolutions take the members' channels side by side: [K n, C, H, W] -> [n, K C, H, W].
    beside = inputs.unflatten(0, (num, -1)).transpose(0, 1).flatten(1, 2)
    options: dict[str, Any] = {"stride": like.stride, "padding": like.padding, "dilation": like.dilation}
    hidden = F.conv2d(beside, down.flatten(0, 1), groups=num, **options)
    scale = scale.to(hidden.dtype)[:, None, None, None]
    hidden = (hidden.unflatten(1, (num, -1)) * scale).flatten(1, 2)
    output = F.conv2d(hidden, up.flatten(0, 1), groups=num)
    return output.unflatten(1, (num, -1)).transpose(0, 1).flatten(0, 1)
