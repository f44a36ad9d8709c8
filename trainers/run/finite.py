"""Finds tensors with values that are not finite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def find_not_finite(state: Any, name: str = "") -> str | None:
    """Return the name of a tensor with infinite or NaN values in nested dicts and lists; None without one."""
    tensors = dict(_floating(state, name))
    if not tensors:
        return None
    # A norm is not finite if an element is not, and is computed ten times as fast as a test of each element. Norms of
    # large finite elements overflow, so that what they suspect is tested exactly.
    norms = [torch.linalg.vector_norm(tensor).float() for tensor in tensors.values()]
    home = norms[0].device  # one transfer to the host for all tensors
    good = torch.stack([norm.to(home) for norm in norms]).isfinite().tolist()
    suspects = (name for name, is_good in zip(tensors, good, strict=True) if not is_good)
    return next((name for name in suspects if not tensors[name].isfinite().all()), None)


def _floating(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield name, value.detach()
    elif isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _floating(inner, f"{name}.{key}".lstrip("."))
