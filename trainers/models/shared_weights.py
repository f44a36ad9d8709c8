"""The weights that copies of one model share, on each device and in each precision that they are moved to."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class SharedWeights:
    """The parameters and buffers of a model in host memory, and their copies on devices.

    A copy of the model is built on the originals, as a model alone is, and is moved afterwards: then its frozen tensors
    are replaced by those that the copies before it were moved to.
    """

    def __init__(self, parts: Iterable[nn.Module]):
        tensors = [t for part in parts for t in (*part.parameters(), *part.buffers())]
        self._originals = {id(tensor): tensor for tensor in tensors}
        self._placed: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """The original parameters and buffers."""
        return list(self._originals.values())

    def place(self, part: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
        """Replace the frozen originals in a part by copies on ``device``, floating-point ones in ``dtype``.

        ``dtype`` None: the precision of the original.
        """
        for module in part.modules():
            for named in (module._parameters, module._buffers):
                for name, tensor in named.items():
                    if tensor is not None and id(tensor) in self._originals and not tensor.requires_grad:
                        named[name] = self._copy(tensor, device, dtype)  # type: ignore[assignment]

    def _copy(self, tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if tensor.device == device and tensor.dtype == wanted:
            return tensor
        key = id(tensor), device, wanted
        if key not in self._placed:
            moved = tensor.detach().to(device, wanted)
            is_parameter = isinstance(tensor, nn.Parameter)
            self._placed[key] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
        return self._placed[key]
