"""Inserts adapters into the layers of a module with peft, fills them, merges them into weights, removes them.

Source: Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dreamfleet.trainers.models.factor_layers import FactorShape, factor_parameters, wrap_layer
from dreamfleet.trainers.models.formats.lora import Matrices
from dreamfleet.trainers.models.formats.lycoris import Factors

MAGNITUDE = "lora_magnitude_vector"  # peft's name of the lengths of a DoRA


class Strength(NamedTuple):
    """The strengths at which a LoRA is applied to the text encoders and to the denoiser."""

    text: float = 1.0
    denoiser: float = 1.0

    def __str__(self) -> str:
        """Return the strength in the syntax of a prompt's tag, ``0.8`` or ``TEXT:DENOISER``."""
        same = self.text == self.denoiser
        return f"{self.denoiser:g}" if same else f"{self.text:g}:{self.denoiser:g}"


def has_adapters(part: nn.Module) -> bool:
    """Return whether any layer of a part has an adapter."""
    return hasattr(part, "peft_config")


def adapted(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers of a part that have adapters, by name; of layers around one another the outermost."""
    if has_adapters(part):
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, module in part.named_modules():
            if isinstance(module, BaseTunerLayer) and not name.endswith(".base_layer"):
                yield name, module


def nested(layer: Any) -> Iterator[Any]:
    """Yield a layer with adapters, then those inside it: a LoKr or LoHa of a file is a layer around the others."""
    while hasattr(layer, "base_layer"):
        yield layer
        layer = layer.base_layer


def insert_adapters(
    part: Any,
    layers: Mapping[str, tuple[int, float]],
    *,
    adapter: str,
    dropout: float = 0.0,
    use_dora: bool = False,
) -> None:
    """Add an adapter to the named layers; ``layers``: name -> (rank, alpha).

    ``lora_A`` is initialised from a normal distribution with standard deviation 1 / rank, ``lora_B`` with zeros.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if not layers:
        return
    if has_adapters(part):
        del (
            part.peft_config
        )  # otherwise peft warns about a second adapter; it finds the wrapped layers without this
    rank, alpha = next(iter(layers.values()))
    inject_adapter_in_model(
        LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # peft accepts fractions too
            lora_dropout=dropout,
            use_dora=use_dora,
            target_modules=list(layers),
            rank_pattern={f"^{name}": r for name, (r, _) in layers.items() if r != rank},
            alpha_pattern={f"^{name}": a for name, (_, a) in layers.items() if a != alpha},
            init_lora_weights="gaussian",
        ),
        part,
        adapter_name=adapter,
    )


def insert_factors(part: Any, layers: Mapping[str, FactorShape], *, adapter: str) -> None:
    """Add a trainable LoKr or LoHa, initially without effect, to the named layers."""
    for name, shape in layers.items():
        module = part.get_submodule(name)
        factors = shape.make(module.weight)
        _wrap(part, name, wrap_layer(module, factors, adapter=adapter, module_dropout=shape.module_dropout))


def apply_factors(part: Any, layers: Mapping[str, Factors], *, adapter: str, strength: float) -> None:
    """Add the LoKr or LoHa of a file to the named layers, around the adapters that they have."""
    for name, factors in layers.items():
        module = part.get_submodule(name)
        _wrap(part, name, wrap_layer(module, factors, adapter=adapter, strength=strength))


def _wrap(part: Any, name: str, layer: Any) -> None:
    _replace(part, name, layer)
    part.peft_config = getattr(part, "peft_config", {})  # marks a part with adapters, as peft does


def freeze_adapters(part: nn.Module) -> None:
    """Activate all adapters of a part, without gradients."""
    for _, outermost in adapted(part):
        for layer in nested(outermost):
            held = layer.lora_A if hasattr(layer, "lora_A") else layer.r
            layer.set_adapter(list(held), inference_mode=True)


def remove_adapters(part: Any) -> None:
    """Remove all adapters from a part; the weights of its layers are unchanged."""
    for name, layer in list(adapted(part)):
        _replace(part, name, layer.get_base_layer())
    if has_adapters(part):
        del part.peft_config


def adapter_tree(part: nn.Module, adapter: str) -> nn.Module:
    """Return a module tree with only an adapter's submodules, including dropout, under the names of the part."""
    root = nn.Module()
    for name, layer in adapted(part):
        node = root
        for piece in name.split("."):
            if piece not in dict(node.named_children()):
                node.add_module(piece, nn.Module())
            node = node.get_submodule(piece)
        for kind in ("lora_A", "lora_B", "lora_dropout", MAGNITUDE):
            if adapter in getattr(layer, kind, ()):
                node.add_module(kind, getattr(layer, kind)[adapter])
        for key, parameter in factor_parameters(layer, adapter).items():
            node.register_parameter(key, parameter)
    return root


def fill_adapter(layer: Any, adapter: str, matrices: Matrices) -> None:
    """Copy the matrices of a LoRA file into a layer's adapter."""
    with torch.no_grad():
        layer.lora_A[adapter].weight.copy_(matrices.down)
        layer.lora_B[adapter].weight.copy_(matrices.up)
        if matrices.magnitude is not None:
            lengths = getattr(layer, MAGNITUDE)[adapter].weight
            lengths.copy_(matrices.magnitude.reshape(lengths.shape))


def magnitude_of(layer: Any, adapter: str) -> Tensor | None:
    """Return the lengths ``[out]`` of a layer's weights if its adapter is a DoRA, else None."""
    lengths = getattr(layer, MAGNITUDE, ())
    return lengths[adapter].weight.reshape(-1) if adapter in lengths else None  # type: ignore[call-overload]


def fit_matrices(matrices: Matrices, module: nn.Module) -> Matrices | None:
    """Return the matrices reshaped for the adapter of a layer; None if they do not fit the layer.

    Files store the matrices of 1 x 1 convolutions either with or without the kernel dimensions.
    """
    down, up, alpha, magnitude = matrices
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return None
    leaving, entering, *kernel = module.weight.shape
    if down.numel() != len(down) * entering * int(torch.Size(kernel).numel()) or up.shape[0] != leaving:
        return None
    ones = [1] * len(kernel)
    return Matrices(down.reshape(-1, entering, *kernel), up.reshape(leaving, -1, *ones), alpha, magnitude)


def fits_layer(factors: Factors, module: nn.Module) -> bool:
    """Return whether a LoKr or LoHa has the size of a layer."""
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return False
    weight = module.weight
    return factors.shape() == (weight.shape[0], weight.shape[1:].numel())


def fold_adapter(part: nn.Module, name: str, layer: Any) -> Callable[[], None]:
    """Replace a layer with adapters by the original layer with the adapters merged into its weight.

    The layer's output has equal changes in the order in which they are applied: a LoRA, LoKr or LoHa adds to the
    output; a DoRA scales the output so far by its lengths over those of the original weight and its own change, and
    adds. Returns a function that undoes this.
    """
    base = layer.get_base_layer()
    weight: Tensor = base.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        changed = kept.float()
        applied = [(one, adapter) for one in reversed(list(nested(layer))) for adapter in one.active_adapters]
        for one, adapter in applied:
            own = one.get_delta_weight(adapter).to(weight.device, torch.float32)
            changed = changed + own
            if (lengths := magnitude_of(one, adapter)) is not None:
                ratio = lengths.float() / (kept.float() + own).flatten(1).norm(dim=1)
                changed = changed * ratio.reshape(-1, *[1] * (changed.ndim - 1))
        weight.copy_(changed)
    _replace(part, name, base)

    def undo() -> None:
        with torch.no_grad():
            weight.copy_(kept)
        _replace(part, name, layer)

    return undo


def cast_frozen(part: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen parameters of a part to ``dtype``; its trainable adapters keep full precision."""
    for param in part.parameters():
        if not param.requires_grad and param.is_floating_point():
            param.data = param.data.to(dtype)


def _replace(part: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(part.get_submodule(parent), last, module)
