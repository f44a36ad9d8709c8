"""Layers of LoKr and LoHa in LoRA files: a layer's change as a product of factors other than two matrices.

LoKr (Kronecker product): ``scale * kron(w1, w2)``; LoHa (Hadamard product): ``scale * (w1_a @ w1_b) * (w2_a @ w2_b)``.
Source: LyCORIS 4.1, ``lycoris/functional/lokr.py`` and ``loha.py``; its keys are those of ComfyUI and the webui too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dreamfleet.datasets.errors import FormatError

#: Keys of each kind in a file, after the name of the layer; which of them exist decides how w1 and w2 are factored.
KEYS: dict[str, tuple[str, ...]] = {
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
}
KIND_OF_KEY = {key: kind for kind, keys in KEYS.items() for key in keys}
FACTOR_KEYS = frozenset(KIND_OF_KEY)


@dataclass(frozen=True)
class Factors:
    """The LoKr or LoHa of one layer: its tensors by LyCORIS's keys, and alpha.

    LoKr: ``lokr_w1`` ``[a, c]``, or ``lokr_w1_a`` ``[a, r]`` and ``lokr_w1_b`` ``[r, c]``; ``lokr_w2`` ``[b, d]`` (of
    convolutions ``[b, d, kh, kw]``), or ``lokr_w2_a`` ``[b, r]`` and ``lokr_w2_b`` ``[r, d * kh * kw]``, or with
    ``lokr_t2`` ``[r, r, kh, kw]`` the transposed ``[r, b]`` and ``[r, d]``. It has a * b outputs, c * d inputs.

    LoHa: ``hada_w1_a``, ``hada_w2_a`` ``[out, r]`` and ``hada_w1_b``, ``hada_w2_b`` ``[r, in * kh * kw]``, or with
    ``hada_t1`` and ``hada_t2`` ``[r, r, kh, kw]`` the transposed ``[r, out]`` and ``[r, in]``.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    alpha: float

    @property
    def rank(self) -> int | None:
        """The rank r; None for a LoKr of two whole matrices."""
        for key, axis in (("lokr_w1_b", 0), ("lokr_w2_b", 0), ("hada_w1_b", 0)):
            if key in self.tensors:
                return self.tensors[key].shape[axis]
        return None

    @property
    def scale(self) -> float:
        """What the product is multiplied by: alpha / rank; 1 without a rank, where every program ignores alpha."""
        return 1.0 if self.rank is None else self.alpha / self.rank

    def shape(self) -> tuple[int, int]:
        """Return the outputs, and the inputs times the kernel's size, of the layers that it fits.

        Raises ValueError if the tensors do not fit one another.
        """
        if self.kind == "loha":
            sizes = {self._pair("hada_w1", "hada_t1"), self._pair("hada_w2", "hada_t2")}
            if len(sizes) > 1:
                raise ValueError("its two products differ in size")
            return sizes.pop()
        w1, w2 = self._pair("lokr_w1", ""), self._pair("lokr_w2", "lokr_t2")
        return w1[0] * w2[0], w1[1] * w2[1]

    def _pair(self, name: str, core: str) -> tuple[int, int]:
        """Return the size of ``name``, whole or factored, as a matrix."""
        whole, a, b = (self.tensors.get(name + end) for end in ("", "_a", "_b"))
        if (whole is None) == (a is None and b is None):
            raise ValueError(f"of {name}, either the whole or both factors are needed")
        if whole is not None:
            if whole.ndim not in (2, 4) or not whole.numel():
                raise ValueError(f"{name} has the shape {list(whole.shape)}")
            return whole.shape[0], whole.shape[1:].numel()
        if a is None or b is None:
            raise ValueError(f"{name} has one factor only")
        if a.ndim != 2 or b.ndim != 2 or not a.numel() or not b.numel():
            raise ValueError(f"{name} has the factors {list(a.shape)} and {list(b.shape)}")
        middle = self.tensors.get(core)
        if middle is None:
            if a.shape[1] != b.shape[0]:
                raise ValueError(f"{name} has the factors {list(a.shape)} and {list(b.shape)}")
            return a.shape[0], b.shape[1]
        if middle.ndim != 4 or tuple(middle.shape[:2]) != (len(a), len(b)) or len(a) != len(b):
            raise ValueError(f"{core} {list(middle.shape)} does not fit {list(a.shape)} and {list(b.shape)}")
        return a.shape[1], b.shape[1] * middle.shape[2:].numel()


def read_factors(layer: str, parts: Mapping[str, Tensor], path: Path) -> Factors:
    """Return the LoKr or LoHa of a layer from its tensors by key. Raises FormatError if they do not fit."""
    kinds = {KIND_OF_KEY[key] for key in parts if key in KIND_OF_KEY}
    extra = [key for key in parts if key not in (*FACTOR_KEYS, "alpha")]
    if len(kinds) > 1 or extra:
        raise FormatError(
            f"{path}: the layer {layer} mixes {', '.join(sorted(parts))}; a LoKr or LoHa with weight decomposition, or "
            "beside a LoRA, cannot be read."
        )
    tensors = {key: tensor.float() for key, tensor in parts.items() if key != "alpha"}
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise FormatError(f"{path}: the layer {layer} holds NaN or infinite numbers; its training failed.")
    alpha = parts["alpha"].reshape(-1).tolist() if "alpha" in parts else []
    found = Factors(kinds.pop(), tensors, 1.0)
    try:
        found.shape()
    except ValueError as error:
        raise FormatError(f"{path}: the layer {layer} is damaged: {error}.") from error
    default = 1.0 if found.rank is None else float(found.rank)
    value = float(alpha[0]) if len(alpha) == 1 else default
    if not math.isfinite(value) or len(alpha) > 1:
        raise FormatError(f"{path}: the layer {layer} has an alpha that is not a number.")
    return Factors(found.kind, tensors, value)


def factor_entries(
    name: str, factors: Factors, *, dtype: torch.dtype, layer: str, path: Path
) -> dict[str, Tensor]:
    """Return the tensors of a layer for a file in kohya's layout. Raises FormatError for NaN and infinities."""
    if not all(torch.isfinite(tensor).all() for tensor in factors.tensors.values()):
        raise FormatError(f"{path}: the layer {layer} holds NaN or infinite numbers; its training failed.")
    entries = {f"{name}.alpha": torch.tensor(float(factors.alpha))}
    return entries | {f"{name}.{key}": value.float().to(dtype) for key, value in factors.tensors.items()}
