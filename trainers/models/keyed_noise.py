"""Noise and timesteps that depend only on a sample's key, and not on its batch, its rank or the draw order.

Shape suffixes: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dreamfleet.datasets.rng import numpy_rng

SampleKey = tuple[int | str, ...]


def keyed_normal(shape: tuple[int, ...], *parts: int | str) -> Tensor:
    """Return a float32 tensor of standard normal numbers, generated on the CPU from the key ``parts``."""
    return torch.from_numpy(numpy_rng(*parts).standard_normal(shape, dtype=np.float32))


def draw_noise(
    keys: Sequence[SampleKey],
    shape: tuple[int, ...],
    *,
    draw_timestep: Callable[[np.random.Generator], float],
    noise_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return noise ``[B, *shape]`` and timesteps ``[B]``, drawn per sample from a generator seeded by its key.

    Timesteps are int64 if ``draw_timestep`` returns integers, float32 otherwise. ``noise_offset`` scales a random
    constant that is added to each channel (Guttenberg 2023, "Diffusion with offset noise"; 0.1 is common).
    """
    noise_BCHW = np.empty((len(keys), *shape), np.float32)
    timesteps = []
    for row, parts in enumerate(keys):
        rng = numpy_rng("noise", *parts)
        rng.standard_normal(out=noise_BCHW[row], dtype=np.float32)
        timesteps.append(draw_timestep(rng))
        if noise_offset:
            per_channel = rng.standard_normal((shape[0], *[1] * (len(shape) - 1)), dtype=np.float32)
            noise_BCHW[row] += np.float32(noise_offset) * per_channel
    return torch.from_numpy(noise_BCHW), torch.tensor(timesteps)
