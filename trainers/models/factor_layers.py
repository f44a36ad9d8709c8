"""Adapters of LoKr and LoHa: their initial factors, and layers that apply them, which are peft's.

Source of the shapes and initial values: LyCORIS 4.1, ``lycoris/modules/lokr.py`` and ``loha.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from dreamfleet.trainers.models.formats.lycoris import FACTOR_KEYS, KEYS, Factors


@dataclass(frozen=True)
class FactorShape:
    """How the change of a layer is factored: ``kind`` lokr or loha, rank and alpha, and the options of LoKr.

    ``factor``: the size of the smaller Kronecker factor, -1 for the nearest to a square root. ``both``: factor the
    smaller one as well; ``whole``: factor none.
    """

    kind: str
    rank: int
    alpha: float
    factor: int = -1
    both: bool = False
    whole: bool = False
    module_dropout: float = 0.0

    def make(self, weight: Tensor) -> Factors:
        """Return new factors, initially without effect, for a weight ``[out, in]`` or ``[out, in, kh, kw]``."""
        made = self._lokr(weight) if self.kind == "lokr" else self._loha(weight)
        tensors = {key: torch.empty(size, device=weight.device) for key, size in made.items()}
        for key, tensor in tensors.items():
            _init(key, tensor, tensors)
        return Factors(self.kind, tensors, self.alpha)

    def _lokr(self, weight: Tensor) -> dict[str, Sequence[int]]:
        leaving, entering, *kernel = weight.shape
        (a, b), (c, d) = factorize(leaving, self.factor), factorize(entering, self.factor)
        sizes: dict[str, Sequence[int]] = {}
        if self.both and not self.whole and self.rank < max(a, c) / 2:
            sizes |= {"lokr_w1_a": (a, self.rank), "lokr_w1_b": (self.rank, c)}
        else:
            sizes["lokr_w1"] = (a, c)
        if self.whole or self.rank >= max(b, d) / 2:
            sizes["lokr_w2"] = (b, d, *kernel)
        else:
            sizes |= {"lokr_w2_a": (b, self.rank), "lokr_w2_b": (self.rank, d * math.prod(kernel))}
        return sizes

    def _loha(self, weight: Tensor) -> dict[str, Sequence[int]]:
        a, b = (len(weight), self.rank), (self.rank, weight.shape[1:].numel())
        return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}


def factorize(size: int, factor: int = -1) -> tuple[int, int]:
    """Return a size as a product, the smaller number first, as LyCORIS does.

    ``factor``: the smaller number if it divides the size, otherwise the largest that it may have; -1 for no limit.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    most = size if factor < 0 else factor
    best = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0 and n <= most)
    return best, size // best


def wrap_layer(
    module: nn.Module, factors: Factors, *, adapter: str, strength: float = 1.0, module_dropout: float = 0.0
) -> Any:
    """Return peft's layer around a linear layer or a convolution, or around another of peft's layers of one.

    Its parameters are copies of the factors, in their precision.
    """
    base: Any = module
    while hasattr(base, "base_layer"):
        base = base.base_layer
    config, kinds = _peft(factors.kind)
    kind = _steady(kinds.Linear if isinstance(base, nn.Linear) else kinds.Conv2d)
    with torch.random.fork_rng(devices=[]):  # peft fills factors of its own first, which are replaced
        layer = kind(module, adapter, config(r=1, module_dropout=module_dropout), r=1, alpha=1.0)
    for key in KEYS[factors.kind]:
        held = getattr(layer, key)
        if adapter in held:
            del held[adapter]
        if key in factors.tensors:
            tensor = factors.tensors[key]
            held[adapter] = nn.Parameter(tensor.detach().clone().to(base.weight.device))
    layer.r[adapter], layer.alpha[adapter] = 1, factors.scale
    layer.scaling[adapter] = factors.scale * strength
    layer.set_adapter([adapter])
    layer.train(base.training)
    return layer


def factors_of(layer: Any, adapter: str, *, alpha: float) -> Factors | None:
    """Return the factors of an adapter of a layer, detached; None if it is another kind of adapter."""
    tensors = {key: tensor.detach() for key, tensor in factor_parameters(layer, adapter).items()}
    if not tensors:
        return None
    kind = next(kind for kind, keys in KEYS.items() if tensors.keys() <= set(keys))
    return Factors(kind, tensors, alpha)


def factor_parameters(layer: Any, adapter: str) -> Mapping[str, nn.Parameter]:
    """Return the parameters of an adapter of a layer by LyCORIS's keys; empty if it is another kind of adapter."""
    held = {key: getattr(layer, key) for key in sorted(FACTOR_KEYS) if hasattr(layer, key)}
    return {key: parameters[adapter] for key, parameters in held.items() if adapter in parameters}


@lru_cache
def _steady(kind: type[Any]) -> type[Any]:
    """Return a layer of peft's that draws a random number in a forward pass only if it has dropout.

    Peft draws one in training mode always, which has no value while the memory of a run is planned.
    """

    class Steady(kind):  # type: ignore[misc]
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.training = mode and any(self.module_dropout.values())
            return self

    return Steady


def _peft(kind: str) -> tuple[Any, Any]:
    """Return peft's configuration and layers of a kind."""
    if kind == "lokr":
        from peft import LoKrConfig
        from peft.tuners.lokr import layer as lokr

        return LoKrConfig, lokr
    from peft import LoHaConfig
    from peft.tuners.loha import layer as loha

    return LoHaConfig, loha


def _init(key: str, tensor: Tensor, all_of: Mapping[str, Tensor]) -> None:
    """Fill a new factor with LyCORIS's initial values: the last factor is zero, so the product is."""
    if key in ("hada_w2_a", "lokr_w2_b") or (key == "lokr_w2" and "lokr_w2_b" not in all_of):
        nn.init.zeros_(tensor)
    elif key.startswith("hada"):
        nn.init.normal_(tensor, std=0.1 if key == "hada_w1_a" else 1.0)
    else:
        nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
