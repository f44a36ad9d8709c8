"""Noise and timesteps that depend only on a sample's key, and not on its batch, its rank or the draw order.

Shape suffixes: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dreamfleet.datasets.rng import numpy_rng
from dreamfleet.trainers.config.noise import NoiseConfig
from dreamfleet.trainers.models.timesteps import TimestepDraw

SampleKey = tuple[int | str, ...]
#: Changes the noise ``[C, H, W]`` of one sample: its noise, the generator that drew it, the sample's key, the options.
Shaper = Callable[[np.ndarray, np.random.Generator, SampleKey, NoiseConfig], np.ndarray]


def keyed_normal(shape: tuple[int, ...], *parts: int | str) -> Tensor:
    """Return a float32 tensor of standard normal numbers, generated on the CPU from the key ``parts``."""
    return torch.from_numpy(numpy_rng(*parts).standard_normal(shape, dtype=np.float32))


def draw_noise(
    keys: Sequence[SampleKey],
    shape: tuple[int, ...],
    *,
    draw_timestep: TimestepDraw,
    options: NoiseConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Return noise ``[B, *shape]`` and timesteps ``[B]``, drawn per sample from a generator seeded by its key.

    Timesteps are int64 if ``draw_timestep`` returns integers, float32 otherwise. ``options``: how the noise is shaped;
    None: standard normal noise.
    """
    options = options or NoiseConfig()
    noise_BCHW = np.empty((len(keys), *shape), np.float32)
    timesteps = []
    for row, parts in enumerate(keys):
        rng = numpy_rng("noise", *parts)
        rng.standard_normal(out=noise_BCHW[row], dtype=np.float32)
        timesteps.append(draw_timestep(rng))
        for shape_noise in SHAPERS:
            noise_BCHW[row] = shape_noise(noise_BCHW[row], rng, parts, options)
    return torch.from_numpy(noise_BCHW), torch.tensor(timesteps)


def perturb_input(noise: Tensor, keys: Sequence[SampleKey], options: NoiseConfig) -> Tensor | None:
    """Return the noise ``[B, C, H, W]`` of the denoiser's input if it differs from that of its target, else None.

    It is ``noise + ip_noise_gamma * n`` with n standard normal. Source: Ning et al. 2023 (arXiv 2301.11706).
    """
    if not options.ip_noise_gamma:
        return None
    rows = []
    for one, parts in zip(noise, keys, strict=True):
        rng = numpy_rng("ip_noise", *parts)
        strength = _strength(options.ip_noise_gamma, options.ip_noise_gamma_random_strength, rng)
        rows.append(one + torch.from_numpy(strength * rng.standard_normal(one.shape, dtype=np.float32)))
    return torch.stack(rows)


def add_offset(
    noise_CHW: np.ndarray, rng: np.random.Generator, parts: SampleKey, options: NoiseConfig
) -> np.ndarray:
    """Add a random constant to each channel (Guttenberg 2023, "Diffusion with offset noise"; 0.1 is common)."""
    if not options.noise_offset:
        return noise_CHW
    random = options.noise_offset_random_strength
    strength = _strength(options.noise_offset, random, numpy_rng("offset_strength", *parts))
    ones = [1] * (noise_CHW.ndim - 1)
    return noise_CHW + strength * rng.standard_normal((len(noise_CHW), *ones), dtype=np.float32)


def add_lower_resolutions(
    noise_CHW: np.ndarray, rng: np.random.Generator, parts: SampleKey, options: NoiseConfig
) -> np.ndarray:
    """Add enlarged noise of lower and lower resolutions, and scale the sum to a standard deviation of 1.

    Source: Whitaker 2023, "Multi-resolution noise for diffusion model training"; kohya's ``pyramid_noise_like``, which
    scales a whole batch by one number. Here it is one for each sample, so that its noise does not depend on the batch.
    """
    if not options.multires_noise_iterations:
        return noise_CHW
    rng = numpy_rng("multires", *parts)
    channels, height, width = noise_CHW.shape
    total = torch.from_numpy(noise_CHW)
    for level in range(options.multires_noise_iterations):
        ratio = (2 + 2 * rng.random()) ** level
        low_height, low_width = max(1, int(height / ratio)), max(1, int(width / ratio))
        low = torch.from_numpy(rng.standard_normal((channels, low_height, low_width), dtype=np.float32))
        enlarged = F.interpolate(low[None], (height, width), mode="bilinear")[0]
        total = total + enlarged * options.multires_noise_discount**level
        if 1 in (low_height, low_width):
            break
    return (total / total.std()).numpy()


#: Applied in the order of kohya's scripts.
SHAPERS: tuple[Shaper, ...] = (add_offset, add_lower_resolutions)


def _strength(most: float, is_random: bool, rng: np.random.Generator) -> np.float32:
    return np.float32(most * rng.random() if is_random else most)
