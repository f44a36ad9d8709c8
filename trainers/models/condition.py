"""What a U-Net is told beside the noised latents: the prompt's encoding and, in SDXL, its summary and sizes.

Source: Podell et al. 2023 (arXiv 2307.01952), section 2.2, for the sizes.
B samples, T tokens, D their width, P the summary's width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion


class Condition(NamedTuple):
    """``context`` ``[B, T, D]``; ``pooled`` ``[B, P]`` and ``time_ids`` ``[B, 6]`` in SDXL, else None.

    ``time_ids`` are height and width of the file's picture, top and left of the crop, height and width of what is left,
    in pixels; they are known where a picture is, not where its prompt is encoded.
    """

    context: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """Return it with every tensor changed alike: moved, repeated, split."""
        others = (change(tensor) if tensor is not None else None for tensor in self[1:])
        return Condition(change(self.context), *others)

    def sized(self, time_ids: Tensor | None) -> Condition:
        """Return it with these sizes, where it is of a model that is told sizes."""
        return self if self.pooled is None else self._replace(time_ids=time_ids)

    @property
    def num_bytes(self) -> int:
        """The bytes of all of it."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self if tensor is not None)

    def rows(self) -> list[Condition]:
        """Take the samples apart, each with a first dimension of 1."""
        each = [[None] * len(self.context) if tensor is None else tensor.split(1) for tensor in self]
        return [Condition(*row) for row in zip(*each, strict=True)]

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Put samples after one another."""
        contexts, *others = zip(*parts, strict=True)
        joined = (torch.cat(tensors) if tensors[0] is not None else None for tensors in others)
        return Condition(torch.cat(contexts), *joined)


def condition_of(model: StableDiffusion, batch: dict[str, Any]) -> Condition:
    """Return what the U-Net is told in a batch, encoding the prompts where the text side learns."""
    if "context" in batch:
        found = Condition(batch["context"], batch.get("pooled"))
    else:
        found = model.condition(batch["input_ids"])
    return found.sized(batch.get("time_ids"))


def predict(unet: Any, noisy_BCHW: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
    """Run a U-Net ``[B, C, H, W]`` under a condition, in the precision that it computes in."""
    options = {}
    if condition.pooled is not None:
        added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
        options["added_cond_kwargs"] = added
    return unet(noisy_BCHW, timesteps, condition.context, return_dict=False, **options)[0]


def whole_image_ids(height: int, width: int) -> Tensor:
    """Return the ``time_ids`` ``[1, 6]`` of a picture that was neither resized nor cropped, as pictures are drawn."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
