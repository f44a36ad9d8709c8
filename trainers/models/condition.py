"""The inputs of a denoiser besides the noised latents: the encoded prompt and, in some families, image sizes.

Source of the image sizes: Podell et al. 2023 (arXiv 2307.01952), section 2.2.
Shapes: B samples, T tokens, D width of a token, P width of the pooled encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Condition(NamedTuple):
    """``context`` ``[B, T, D]`` and, in families that use them, ``pooled`` ``[B, P]`` and ``time_ids`` ``[B, 6]``.

    ``time_ids`` are in pixels: height and width of the image file, top and left of the crop, height and width of the
    crop. They depend on the image instead of the prompt, so they are added after the prompt has been encoded.
    """

    context: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """Return the condition with ``change`` applied to every tensor."""
        others = (change(tensor) if tensor is not None else None for tensor in self[1:])
        return Condition(change(self.context), *others)

    def with_sizes(self, time_ids: Tensor) -> Condition:
        """Return the condition with these ``time_ids`` ``[B, 6]``."""
        return self._replace(time_ids=time_ids)

    @property
    def num_bytes(self) -> int:
        """Total size of the tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self if tensor is not None)

    def rows(self) -> list[Condition]:
        """Return a condition of batch size 1 for each sample."""
        each = [[None] * len(self.context) if tensor is None else tensor.split(1) for tensor in self]
        return [Condition(*row) for row in zip(*each, strict=True)]

    def entries(self) -> dict[str, Tensor]:
        """Return the tensors that are set by name, as they are stored in a batch."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}

    @staticmethod
    def in_batch(batch: Mapping[str, Any]) -> Condition:
        """Return the condition stored in a batch; see :meth:`entries`."""
        return Condition(batch["context"], batch.get("pooled"), batch.get("time_ids"))

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Concatenate conditions along the batch dimension."""
        contexts, *others = zip(*parts, strict=True)
        joined = (torch.cat(tensors) if tensors[0] is not None else None for tensors in others)
        return Condition(torch.cat(contexts), *joined)


def whole_image_ids(height: int, width: int) -> Tensor:
    """Return the ``time_ids`` ``[1, 6]`` of an image that was neither resized nor cropped, as for sampling."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
