"""The diffusion loss: keyed noise and timesteps, eps / v targets, min-SNR weights, loss per sample.

Shape suffixes: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dreamfleet.datasets.rng import numpy_rng
from dreamfleet.trainers.models.condition import Condition, predict

SampleKey = tuple[int | str, ...]


def keyed_normal(shape: tuple[int, ...], *parts: int | str) -> Tensor:
    """Draw standard normal float32 numbers that are a function of the parts alone, on the CPU for every device."""
    return torch.from_numpy(numpy_rng(*parts).standard_normal(shape, dtype=np.float32))


def draw_noise(
    keys: Sequence[SampleKey], shape: tuple[int, ...], *, num_timesteps: int, noise_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Draw each sample's noise ``[B, *shape]`` and timestep ``[B]`` from its own key.

    ``noise_offset`` adds a constant per channel (Guttenberg 2023, "Diffusion with offset noise"; 0.1 is usual).
    """
    noise_BCHW = np.empty((len(keys), *shape), np.float32)
    timesteps = np.empty(len(keys), np.int64)
    for row, parts in enumerate(keys):
        rng = numpy_rng("noise", *parts)
        rng.standard_normal(out=noise_BCHW[row], dtype=np.float32)
        timesteps[row] = rng.integers(num_timesteps)
        if noise_offset:
            per_channel = rng.standard_normal((shape[0], *[1] * (len(shape) - 1)), dtype=np.float32)
            noise_BCHW[row] += np.float32(noise_offset) * per_channel
    return torch.from_numpy(noise_BCHW), torch.from_numpy(timesteps)


def noise_loss(
    unet: torch.nn.Module,
    scheduler: Any,
    *,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    condition: Condition,
    snr_gamma: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the loss per sample ``[B]`` of predicting the noise (or velocity) in noised latents.

    ``latents, noise``: ``[B, C, H, W]``, scaled; ``mask``: ``[B, 1, H, W]`` weights, mean 1.
    Source: Ho et al. 2020, eq. 14; v target: Salimans & Ho 2022; ``snr_gamma``: Hang et al. 2023 (min-SNR), eq. 4.
    """
    noisy_BCHW = scheduler.add_noise(latents, noise, timesteps)
    predicted_BCHW = predict(unet, noisy_BCHW, timesteps, condition)
    return prediction_loss(
        scheduler,
        predicted_BCHW,
        latents=latents,
        noise=noise,
        timesteps=timesteps,
        snr_gamma=snr_gamma,
        mask=mask,
    )


def prediction_loss(
    scheduler: Any,
    predicted_BCHW: Tensor,
    *,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    snr_gamma: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the loss per sample ``[B]`` of what the model predicted; see :func:`noise_loss`."""
    target_BCHW = make_target(scheduler, latents, noise, timesteps)
    error_BCHW = F.mse_loss(predicted_BCHW.float(), target_BCHW.float(), reduction="none")
    if mask is not None:
        error_BCHW = error_BCHW * mask
    per_sample = error_BCHW.flatten(1).mean(1)
    if snr_gamma is not None:
        per_sample = per_sample * snr_weights(scheduler, timesteps, snr_gamma)
    return per_sample


def make_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the model learns to predict: the noise (``epsilon``), the velocity, or the latents (``sample``)."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    if kind == "sample":
        return latents
    raise ValueError(f"unknown prediction_type {kind!r}; known: epsilon, v_prediction, sample")


def clean_estimate(scheduler: Any, predicted: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """Return the clean latents ``[B, C, H, W]`` that a prediction amounts to, unclamped, in float32.

    Source: Ho et al. 2020, eq. 15; v: Salimans & Ho 2022, appendix D.
    """
    abar = scheduler.alphas_cumprod.to(noisy.device)[timesteps].float()[:, None, None, None]
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return predicted.float()
    if kind == "v_prediction":
        return abar.sqrt() * noisy.float() - (1 - abar).sqrt() * predicted.float()
    return (noisy.float() - (1 - abar).sqrt() * predicted.float()) / abar.sqrt()


def signal_to_noise(scheduler: Any, timesteps: Tensor) -> Tensor:
    """Return the SNR ``abar / (1 - abar)`` at each timestep, ``[B]``."""
    abar = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return abar / (1 - abar)


def snr_weights(scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """Return the min-SNR weight of each sample, ``[B]``: min(SNR, gamma) / SNR for eps, / (SNR + 1) for v."""
    snr = signal_to_noise(scheduler, timesteps)
    clipped = snr.clamp(max=gamma)
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return clipped / (snr + 1)
    # A zero-terminal-SNR schedule has SNR 0 at the last step, where eps carries no signal to weigh.
    return clipped if kind == "sample" else torch.where(snr > 0, clipped / snr.clamp(min=1e-12), 0.0)
