"""Hypernetworks: MLPs applied to the inputs of the key and value projections of a U-Net's attention layers.

Source of the formulas and names: AUTOMATIC1111's webui, `modules/hypernetworks/hypernetwork.py`.
Shapes: B images, T tokens or latent cells, D their width.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.config.hypernetwork_structure import ACTIVATIONS, Structure
from dreamfleet.trainers.models.formats.hypernetwork import HypernetworkFile, read_hypernetwork

# The webui passes no dimension, so torch uses dimension 0 of [B, T, D], which mixes the images of a batch.
_DIMENSION = {"softmax": 0, "softmin": 0, "logsoftmax": 0}


class HypernetworkModule(nn.Module):
    """One MLP for contexts of one width: ``x + multiplier * linear(x)``, computed in the MLP's precision."""

    def __init__(self, width: int, structure: Structure):
        super().__init__()
        layers: list[nn.Module] = []
        for number, (entering, leaving) in enumerate(pairwise(structure.sizes(width)), start=1):
            layers.append(nn.Linear(entering, leaving))
            if structure.is_activated(number):
                name = structure.activation_func
                options = {"dim": _DIMENSION[name]} if name in _DIMENSION else {}
                layers.append(getattr(nn, ACTIVATIONS[name])(**options))
            if structure.add_layer_norm:
                layers.append(nn.LayerNorm(leaving))
            if rate := structure.dropout_structure[number]:
                layers.append(nn.Dropout(rate))
        # Parameter names in the file, such as `linear.0.weight`, are numbered by position among all of these layers.
        self.linear = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Linear | nn.LayerNorm):
                _initialise(layer, structure)

    def forward(self, context: Tensor, multiplier: float = 1.0) -> Tensor:
        """Return the changed context ``[B, T, D]`` in the dtype of ``context``."""
        change = self.linear(context.to(next(self.parameters()).dtype))
        return (context + multiplier * change).to(context.dtype)


class Hypernetwork(nn.Module):
    """Two MLPs for each context width, one for keys and one for values, shared by all attention layers."""

    def __init__(self, widths: Iterable[int], structure: Structure):
        super().__init__()
        self.structure = structure
        self.layers = nn.ModuleDict(
            {
                str(width): nn.ModuleList(HypernetworkModule(width, structure) for _ in range(2))
                for width in sorted(widths)
            }
        )

    @classmethod
    def from_file(cls, file: HypernetworkFile) -> Hypernetwork:
        """Build the frozen hypernetwork of a file, in evaluation mode."""
        with torch.device("meta"):  # the file's tensors replace the parameters
            network = cls(file.weights, file.structure)
        for width, pair in file.weights.items():
            for module, part in zip(network.layers[str(width)], pair, strict=True):  # type: ignore[call-overload]
                module.load_state_dict(part, assign=True)
        return network.requires_grad_(False).eval()

    @property
    def widths(self) -> list[int]:
        """The context widths that it has MLPs for, ascending."""
        return [int(width) for width in self.layers]

    def to_file(self, name: str, **entries: Any) -> HypernetworkFile:
        """Return the content of a file called ``name``; ``entries`` are its descriptive fields, such as ``step``."""
        pairs: Any = {width: self.layers[str(width)] for width in self.widths}
        weights = {width: (keys.state_dict(), values.state_dict()) for width, (keys, values) in pairs.items()}
        return HypernetworkFile(name, self.structure, weights, **entries)

    def keys(self, context: Tensor, multiplier: float = 1.0) -> Tensor:
        """Return the new input of the key projection ``[B, T, D]``; unchanged for a width without MLPs."""
        return self._change(0, context, multiplier)

    def values(self, context: Tensor, multiplier: float = 1.0) -> Tensor:
        """Return the new input of the value projection ``[B, T, D]``; unchanged for a width without MLPs."""
        return self._change(1, context, multiplier)

    def _change(self, which: int, context: Tensor, multiplier: float) -> Tensor:
        width = str(context.shape[-1])
        if width not in self.layers:
            return context
        pair: Any = self.layers[width]
        if pair[which].linear[0].weight.device != context.device:
            self.to(context.device)  # the pipeline was moved after the hypernetwork had been applied
        return pair[which](context, multiplier)


class ChangesContext(Protocol):
    """What changes the inputs of the key and value projections: a hypernetwork, or those of several trainings."""

    def keys(self, context: Tensor, multiplier: float = 1.0) -> Tensor:
        """Return the new input of the key projection ``[B, T, D]``."""
        ...

    def values(self, context: Tensor, multiplier: float = 1.0) -> Tensor:
        """Return the new input of the value projection ``[B, T, D]``."""
        ...


Applied = tuple[Hypernetwork, float]  # a hypernetwork and its multiplier


class HypernetworkProcessor:
    """A diffusers attention processor that wraps another one (SDPA, sliced, xformers) and changes keys and values.

    It is deliberately not an ``nn.Module``, so that the MLPs are not among the U-Net's parameters or in checkpoints.
    """

    def __init__(self, inner: Any, applied: Sequence[tuple[ChangesContext, float]]):
        self.inner, self.applied = inner, applied

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute attention with the inner processor and changed keys and values; queries are unchanged."""
        changed = _ChangedAttention(attn, self.applied)
        return self.inner(changed, hidden_states, encoder_hidden_states, attention_mask)


class _ChangedAttention:
    """A proxy of an attention layer whose key and value projections get changed contexts."""

    def __init__(self, attn: Any, applied: Sequence[tuple[ChangesContext, float]]):
        self._attn, self._applied = attn, applied

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    def to_k(self, context: Tensor) -> Tensor:
        for network, multiplier in self._applied:
            context = network.keys(context, multiplier)
        return self._attn.to_k(context)

    def to_v(self, context: Tensor) -> Tensor:
        for network, multiplier in self._applied:
            context = network.values(context, multiplier)
        return self._attn.to_v(context)


def context_widths(unet: Any) -> list[int]:
    """Return the context widths in a U-Net, ascending: of its levels (self-attention) and of the text (cross)."""
    return sorted({attn.to_k.in_features for attn in _attentions(unet)})


def set_hypernetworks(unet: Any, applied: Sequence[tuple[ChangesContext, float]]) -> None:
    """Apply hypernetworks to a U-Net in this order, replacing those applied before; an empty list removes all.

    Raises ModelError if the U-Net's attention has a modification that hypernetworks cannot be combined with.
    """
    for attn in _attentions(unet):
        inner = attn.processor
        if isinstance(inner, HypernetworkProcessor):
            inner = inner.inner
        if isinstance(inner, nn.Module) or getattr(attn, "fused_projections", False):
            raise ModelError(
                f"hypernetworks cannot be combined with {type(inner).__name__} (an IP-Adapter, or fused projections): "
                "remove it first, with unload_ip_adapter() or unfuse_qkv_projections()"
            )
        attn.set_processor(HypernetworkProcessor(inner, tuple(applied)) if applied else inner)


def applied_hypernetworks(unet: Any) -> list[Applied]:
    """Return the hypernetworks applied to a U-Net, in order."""
    processors = (attn.processor for attn in _attentions(unet))
    found = next((one.applied for one in processors if isinstance(one, HypernetworkProcessor)), ())
    return [(network, multiplier) for network, multiplier in found if isinstance(network, Hypernetwork)]


def load_hypernetwork(pipe: Any, path: str | os.PathLike[str], multiplier: float = 1.0) -> Hypernetwork:
    """Apply a webui hypernetwork file to a diffusers pipeline after those already applied; return it.

    ``pipe`` is a `StableDiffusionPipeline` or any object with a ``unet``. Call this after `enable_attention_slicing`
    and similar methods, which replace the attention processors. Raises FormatError if the file is not a hypernetwork,
    ModelError if it has no MLPs for the widths of this model.
    """
    network = read_network(path)
    require_fit(network, pipe.unet, str(path))
    set_hypernetworks(pipe.unet, [*applied_hypernetworks(pipe.unet), (network, multiplier)])
    return network


def read_network(path: str | os.PathLike[str]) -> Hypernetwork:
    """Read a hypernetwork file as a frozen module on the CPU. Raises FormatError if it is not a hypernetwork."""
    return Hypernetwork.from_file(read_hypernetwork(path))


def unload_hypernetworks(pipe: Any) -> None:
    """Remove all hypernetworks from a pipeline."""
    set_hypernetworks(pipe.unet, [])


def require_fit(network: Hypernetwork, unet: Any, name: str) -> None:
    """Raise ModelError if none of the U-Net's context widths is among the hypernetwork's."""
    if not set(network.widths) & set(context_widths(unet)):
        raise ModelError(
            f"{name} changes contexts of the widths {network.widths}, but this model's are {context_widths(unet)}: "
            "it was made for another family of models"
        )


def _attentions(unet: Any) -> list[Any]:
    from diffusers.models.attention_processor import Attention

    return [module for module in unet.modules() if isinstance(module, Attention)]


def _initialise(layer: nn.Linear | nn.LayerNorm, structure: Structure) -> None:
    weight, how = layer.weight, structure.weight_init
    slope: Literal["leaky_relu", "relu"] = (
        "leaky_relu" if structure.activation_func == "leakyrelu" else "relu"
    )
    if how == "Normal" or isinstance(layer, nn.LayerNorm):  # as in the webui, also for a norm's gain
        nn.init.normal_(weight, std=0.01)
    elif how == "XavierUniform":
        nn.init.xavier_uniform_(weight)
    elif how == "XavierNormal":
        nn.init.xavier_normal_(weight)
    elif how == "KaimingUniform":
        nn.init.kaiming_uniform_(weight, nonlinearity=slope)
    else:
        nn.init.kaiming_normal_(weight, nonlinearity=slope)
    nn.init.zeros_(layer.bias)
