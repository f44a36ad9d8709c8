"""Classifier-free guidance while training: fixed or by the timestep, and the guided prediction.

Source: DreamArtist (arXiv 2211.11337; webui extension, `scripts/dream_artist/cptuning.py`), HCP-Diffusion.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.models.condition import Condition, predict

Curve = Literal["ln", "cos", "cos2"]

_NUMBER = r"(\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})"
_TEXT = re.compile(rf"\s*{_NUMBER}\s*(?:-\s*{_NUMBER}\s*(?::\s*(ln|cos|cos2)\s*)?)?", re.ASCII)


class Guidance(NamedTuple):
    """How strongly a prediction is guided: ``low`` at timestep 0, ``high`` at the last one."""

    low: float
    high: float
    curve: Curve = "ln"

    def at(self, timesteps: Tensor, num_timesteps: int) -> Tensor:
        """Return the scale of each sample ``[B]`` at its timestep.

        With rate = t / (T - 1): ``ln`` rises with the rate, ``cos`` with cos((rate - 1) pi / 2), which is fast at
        first, ``cos2`` with 1 - cos(rate pi / 2), which is slow at first.
        """
        rate = timesteps.float() / max(1, num_timesteps - 1)
        if self.curve == "cos":
            rate = torch.cos((rate - 1) * math.pi / 2)
        elif self.curve == "cos2":
            rate = 1 - torch.cos(rate * math.pi / 2)
        return self.low + (self.high - self.low) * rate


def parse_guidance(value: float | str) -> Guidance:
    """Read a fixed scale, ``3.0``, or one that goes with the timestep: ``1.5-3.0``, ``1.0-3.0:cos``.

    Raises RecipeError for anything else, and for a scale of 0 throughout, which trains the negative alone.
    """
    match = _TEXT.fullmatch(str(value))
    if match is None:
        raise RecipeError(
            f"{value!r} is no guidance: write a number such as 3.0, or low-high with an optional curve "
            "(ln, cos or cos2), such as 1.5-3.0:cos"
        )
    low, high, curve = match.groups()
    guidance = Guidance(float(low), float(high or low), cast(Curve, curve or "ln"))
    if not (guidance.low or guidance.high):
        raise RecipeError(f"{value!r}: with a guidance of 0 the positive vectors would never learn; try 3.0")
    return guidance


def guided_prediction(
    unet: Any, noisy_BCHW: Tensor, timesteps: Tensor, pairs: Condition, scale_B: Tensor
) -> Tensor:
    """Predict ``negative + scale (positive - negative)`` ``[B, C, H, W]`` in one pass, with gradients to both.

    ``pairs`` holds each sample's negative and positive condition: a second dimension of 2 in every tensor.
    """
    both = predict(
        unet,
        torch.cat([noisy_BCHW, noisy_BCHW]),
        torch.cat([timesteps, timesteps]),
        pairs.map(lambda tensor: tensor.transpose(0, 1).flatten(0, 1)),
    )
    negative_BCHW, positive_BCHW = both.float().chunk(2)
    return negative_BCHW + scale_B[:, None, None, None] * (positive_BCHW - negative_BCHW)
