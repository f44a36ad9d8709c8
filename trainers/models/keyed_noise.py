"""Noise and timesteps that are a function of a sample's key alone, never of its batch, rank or draw order.

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
    """Return standard normal float32 numbers keyed by ``parts``, generated on the CPU for every device."""
    return torch.from_numpy(numpy_rng(*parts).standard_normal(shape, dtype=np.float32))


def draw_noise(
    keys: Sequence[SampleKey],
    shape: tuple[int, ...],
    *,
    draw_timestep: Callable[[np.random.Generator], float],
    noise_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Draw each sample's noise ``[B, *shape]`` and timestep ``[B]`` from a generator of its own key.

    Timesteps are int64 where ``draw_timestep`` returns integers, float32 otherwise. ``noise_offset`` scales a constant
    that is added per channel (Guttenberg 2023, "Diffusion with offset noise"; 0.1 is usual).
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
