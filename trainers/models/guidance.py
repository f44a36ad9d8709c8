"""Classifier-free guidance during training, with a fixed scale or one that depends on the timestep.

Source: DreamArtist (arXiv 2211.11337; webui extension, `scripts/dream_artist/cptuning.py`), HCP-Diffusion.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dreamfleet.trainers.config.guidance import Guidance
from dreamfleet.trainers.models.condition import Condition


def guidance_at(guidance: Guidance, rate: Tensor) -> Tensor:
    """Return the guidance scale of each sample ``[B]`` at its noise level ``rate`` ``[B]``, from 0 to 1.

    From ``low`` to ``high`` the curve ``ln`` is linear in the rate, ``cos`` follows cos((rate - 1) pi / 2), which rises
    fast at first, and ``cos2`` follows 1 - cos(rate pi / 2), which rises slowly at first.
    """
    if guidance.curve == "cos":
        rate = torch.cos((rate - 1) * math.pi / 2)
    elif guidance.curve == "cos2":
        rate = 1 - torch.cos(rate * math.pi / 2)
    return guidance.low + (guidance.high - guidance.low) * rate


def pair_inputs(
    noisy_BCHW: Tensor, timesteps_B: Tensor, pairs: Condition
) -> tuple[Tensor, Tensor, Condition]:
    """Return the denoiser's inputs for both predictions of each sample: B negative ones, then B positive ones.

    ``pairs`` holds each sample's negative and positive condition, in a second dimension of size 2 of every tensor.
    """
    return (
        torch.cat([noisy_BCHW, noisy_BCHW]),
        torch.cat([timesteps_B, timesteps_B]),
        pairs.map(lambda tensor: tensor.transpose(0, 1).flatten(0, 1)),
    )


def guide(predicted: Tensor, scale_B: Tensor) -> Tensor:
    """Return ``negative + scale (positive - negative)`` ``[B, C, H, W]``, with gradients to both predictions.

    ``predicted`` ``[2 B, C, H, W]`` is the denoiser's output for :func:`pair_inputs`.
    """
    negative_BCHW, positive_BCHW = predicted.float().chunk(2)
    return negative_BCHW + scale_B[:, None, None, None] * (positive_BCHW - negative_BCHW)
