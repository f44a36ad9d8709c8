"""Hypernetworks: MLPs on what attention makes its keys and values of; on any U-Net, or in a stock diffusers pipeline.

Source: AUTOMATIC1111's webui, `modules/hypernetworks/hypernetwork.py`, whose formulas and names these are.
B pictures, T tokens or latent cells, D their width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, get_args

from torch import Tensor, nn

from dreamfleet.datasets.errors import ModelError, UserError

WeightInit = Literal["Normal", "XavierUniform", "XavierNormal", "KaimingUniform", "KaimingNormal"]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity,
    "relu": nn.ReLU,
    "leakyrelu": nn.LeakyReLU,
    "elu": nn.ELU,
    "swish": nn.Hardswish,  # so the webui calls it
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "celu": nn.CELU,
    "gelu": nn.GELU,
    "hardshrink": nn.Hardshrink,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "hardtanh": nn.Hardtanh,
    "logsigmoid": nn.LogSigmoid,
    "mish": nn.Mish,
    "prelu": nn.PReLU,
    "relu6": nn.ReLU6,
    "rrelu": nn.RReLU,
    "selu": nn.SELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "softshrink": nn.Softshrink,
    "softsign": nn.Softsign,
    "tanhshrink": nn.Tanhshrink,
    # The webui names no dimension; for [B, T, D] torch then takes the first, so pictures of a batch mix.
    "softmax": partial(nn.Softmax, 0),
    "softmin": partial(nn.Softmin, 0),
    "logsoftmax": partial(nn.LogSoftmax, 0),
    "softmax2d": nn.Softmax2d,
}  # The webui also lists glu, multiheadattention and threshold, which run nowhere between two layers.
MOST_LAYERS = 32  # and the largest multiplier of a width: bounds on what a stranger's file makes us build
DERIVED_DROPOUT = 0.3


@dataclass(frozen=True)
class Structure:
    """How every MLP of a hypernetwork is built.

    ``layer_structure``: widths as multiples of the context's, from 1 to 1. ``dropout_structure``: the rate after each
    of these widths; the first is never used. Raises UserError for what nobody can build.
    """

    layer_structure: tuple[float, ...] = (1, 2, 1)
    activation_func: str = "linear"
    weight_init: WeightInit = "Normal"
    add_layer_norm: bool = False
    activate_output: bool = False
    dropout_structure: tuple[float, ...] = (0, 0, 0)

    def __post_init__(self) -> None:
        layers, dropout = self.layer_structure, self.dropout_structure
        fits = 2 <= len(layers) <= MOST_LAYERS and all(0 < factor <= MOST_LAYERS for factor in layers)
        if not fits or layers[0] != 1 or layers[-1] != 1:
            raise UserError(
                f"layer_structure {list(layers)[:MOST_LAYERS]}: give 2 to {MOST_LAYERS} multiples of the width, the "
                "first and the last 1, such as 1, 2, 1"
            )
        if (
            len(layers) > 2 or self.activate_output
        ):  # else there is none, whatever the name: so the webui reads files
            require_activation(self.activation_func)
        if self.weight_init not in get_args(WeightInit):
            raise UserError(
                f"weight_init {self.weight_init!r}: choose from {', '.join(get_args(WeightInit))}"
            )
        if len(dropout) != len(layers) or not all(0 <= rate < 1 for rate in dropout):
            raise UserError(
                f"dropout_structure {list(dropout)[:MOST_LAYERS]}: give a rate in [0, 1) for each of the {len(layers)} "
                "entries of layer_structure, such as 0, 0.3, 0"
            )


def require_activation(name: str) -> None:
    """Raise UserError for an activation that no MLP can have."""
    if name not in ACTIVATIONS:
        raise UserError(f"activation_func {name!r}: choose from {', '.join(ACTIVATIONS)}")


def derived_dropout(num_entries: int, *, last_layer: bool = False) -> tuple[float, ...]:
    """Return the drop-out structure that the webui makes up where only "use dropout" was said."""
    inner = [DERIVED_DROPOUT] * max(0, num_entries - 3)
    return (0, *inner, DERIVED_DROPOUT if last_layer else 0, 0)[:num_entries]


class HypernetworkModule(nn.Module):
    """One MLP on contexts of one width: ``x + multiplier * linear(x)``, computed in the MLP's own precision."""

    def __init__(self, width: int, structure: Structure):
        super().__init__()
        layers: list[nn.Module] = []
        sizes = [int(width * factor) for factor in structure.layer_structure]
        if min(sizes) < 1:
            raise UserError(f"layer_structure {list(structure.layer_structure)}: width {width} shrinks to 0")
        for number, (entering, leaving) in enumerate(pairwise(sizes), start=1):
            layers.append(nn.Linear(entering, leaving))
            activated = number < len(sizes) - 1 or structure.activate_output
            if structure.activation_func != "linear" and activated:
                layers.append(ACTIVATIONS[structure.activation_func]())
            if structure.add_layer_norm:
                layers.append(nn.LayerNorm(leaving))
            if rate := structure.dropout_structure[number]:
                layers.append(nn.Dropout(rate))
        # The names in the file, `linear.0.weight` on, count all of these.
        self.linear = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Linear | nn.LayerNorm):
                _initialise(layer, structure)

    def forward(self, context: Tensor, multiplier: float = 1.0) -> Tensor:
        """Change a context ``[B, T, D]``; the result has its shape and dtype."""
        change = self.linear(context.to(next(self.parameters()).dtype))
        return (context + multiplier * change).to(context.dtype)


class Hypernetwork(nn.Module):
    """A pair of MLPs for each width of context: one for the keys, one for the values, shared by all layers."""

    def __init__(self, widths: Iterable[int], structure: Structure):
        super().__init__()
        self.structure = structure
        self.layers = nn.ModuleDict(
            {
                str(width): nn.ModuleList(HypernetworkModule(width, structure) for _ in range(2))
                for width in sorted(widths)
            }
        )

    @property
    def widths(self) -> list[int]:
        """The widths of contexts that it changes."""
        return [int(width) for width in self.layers]

    def keys(self, context: Tensor, multiplier: float = 1.0) -> Tensor:
        """Change what keys are made of ``[B, T, D]``; a width it has no layers for stays as it is."""
        return self._change(0, context, multiplier)

    def values(self, context: Tensor, multiplier: float = 1.0) -> Tensor:
        """Change what values are made of ``[B, T, D]``; a width it has no layers for stays as it is."""
        return self._change(1, context, multiplier)

    def _change(self, which: int, context: Tensor, multiplier: float) -> Tensor:
        width = str(context.shape[-1])
        if width not in self.layers:
            return context
        pair: Any = self.layers[width]
        if pair[which].linear[0].weight.device != context.device:
            self.to(context.device)  # the pipeline was moved after the hypernetwork was loaded
        return pair[which](context, multiplier)


Applied = tuple[Hypernetwork, float]  # a hypernetwork and its multiplier


class HypernetworkProcessor:
    """A diffusers attention processor: another one (SDPA, sliced, xformers) with changed keys and values.

    Not an ``nn.Module``, so that the MLPs become no part of the U-Net: its parameters and what is saved stay its own.
    """

    def __init__(self, inner: Any, applied: Sequence[Applied]):
        self.inner, self.applied = inner, applied

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute attention as the inner processor does; the queries stay untouched."""
        changed = _ChangedAttention(attn, self.applied)
        return self.inner(changed, hidden_states, encoder_hidden_states, attention_mask)


class _ChangedAttention:
    """An attention layer that projects changed contexts to keys and values; all else is the layer's own."""

    def __init__(self, attn: Any, applied: Sequence[Applied]):
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
    """Find the widths of all contexts in a U-Net: of its own levels (self-attention) and of the text (cross)."""
    return sorted({attn.to_k.in_features for attn in _attentions(unet)})


def set_hypernetworks(unet: Any, applied: Sequence[Applied]) -> None:
    """Apply hypernetworks to a U-Net in this order, in place of those that it had; none: as it came.

    Raises ModelError where its attention was changed in a way that hypernetworks do not go with.
    """
    for attn in _attentions(unet):
        inner = attn.processor
        if isinstance(inner, HypernetworkProcessor):
            inner = inner.inner
        if isinstance(inner, nn.Module) or getattr(attn, "fused_projections", False):
            raise ModelError(
                f"hypernetworks do not go with {type(inner).__name__} (an IP-Adapter, or fused projections): take "
                "that off first, with unload_ip_adapter() or unfuse_qkv_projections()"
            )
        attn.set_processor(HypernetworkProcessor(inner, tuple(applied)) if applied else inner)


def applied_hypernetworks(unet: Any) -> list[Applied]:
    """Return the hypernetworks a U-Net has, in order."""
    processors = (attn.processor for attn in _attentions(unet))
    return next((list(one.applied) for one in processors if isinstance(one, HypernetworkProcessor)), [])


def load_hypernetwork(pipe: Any, path: str | os.PathLike[str], multiplier: float = 1.0) -> Hypernetwork:
    """Apply a webui hypernetwork file to a diffusers pipeline, after those that it has; returns it.

    ``pipe`` is a `StableDiffusionPipeline`, or whatever else has a ``unet``. Call it after `enable_attention_slicing`
    and the like, which set other attention processors. Raises FormatError for another kind of file, ModelError for a
    hypernetwork with no layers for this model.
    """
    from dreamfleet.trainers.models.formats.hypernetwork import read_hypernetwork

    found = read_hypernetwork(path)
    require_fit(found.network, pipe.unet, str(path))
    set_hypernetworks(pipe.unet, [*applied_hypernetworks(pipe.unet), (found.network, multiplier)])
    return found.network


def unload_hypernetworks(pipe: Any) -> None:
    """Give a pipeline its own attention back."""
    set_hypernetworks(pipe.unet, [])


def require_fit(network: Hypernetwork, unet: Any, name: str) -> None:
    """Raise ModelError when none of a hypernetwork's widths is one of the U-Net's contexts."""
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
    if how == "Normal" or isinstance(layer, nn.LayerNorm):  # the webui starts a norm's gain near 0 as well
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
