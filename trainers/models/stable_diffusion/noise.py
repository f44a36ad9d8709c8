"""Training targets, signal-to-noise ratios and clean estimates: epsilon, v or sample prediction.

Shape suffixes: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def make_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return the U-Net's training target ``[B, C, H, W]``: noise (``epsilon``), velocity, or latents (``sample``).

    Source: Ho et al. 2020 (arXiv 2006.11239), eq. 14; velocity: Salimans & Ho 2022 (arXiv 2202.00512).
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    if kind == "sample":
        return latents
    raise ValueError(f"unknown prediction_type {kind!r}; known: epsilon, v_prediction, sample")


def clean_estimate(scheduler: Any, predicted: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """Return the clean latents ``[B, C, H, W]`` that a prediction implies, unclamped, in float32.

    Source: Ho et al. 2020, eq. 15; velocity: Salimans & Ho 2022, appendix D.
    """
    abar = scheduler.alphas_cumprod.to(noisy.device)[timesteps].float()[:, None, None, None]
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return predicted.float()
    if kind == "v_prediction":
        return abar.sqrt() * noisy.float() - (1 - abar).sqrt() * predicted.float()
    return (noisy.float() - (1 - abar).sqrt() * predicted.float()) / abar.sqrt()


def signal_to_noise(scheduler: Any, timesteps: Tensor) -> Tensor:
    """Return the signal-to-noise ratio ``abar / (1 - abar)`` at each timestep, ``[B]``."""
    abar = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return abar / (1 - abar)
