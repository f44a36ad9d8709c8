"""The denoising loss of a sample: an error function of the prediction, and weights that depend on the timestep.

Shape suffixes: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.config.loss import LOSSES, LossConfig

LARGEST_SNR = 1000.0  # as in kohya's scripts: at the first timestep of some schedules the ratio is infinite
PLAIN = LossConfig()


class NoiseProcess(Protocol):
    """The properties of a :class:`DiffusionModel` that losses depend on."""

    folder: str

    @property
    def title(self) -> str: ...
    @property
    def prediction_type(self) -> str: ...
    @property
    def num_timesteps(self) -> int | None: ...
    def even_timesteps(self, count: int) -> Tensor: ...
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...
    def signal_to_noise(self, timesteps: Tensor, *, needed_by: str) -> Tensor: ...


class Step(NamedTuple):
    """The model, timesteps ``[B]`` and options of a step, on which error functions may depend."""

    model: NoiseProcess
    timesteps: Tensor
    options: LossConfig

    @property
    def threshold(self) -> Tensor:
        """The error ``[B, 1, 1, 1]`` from which on ``huber`` and ``smooth_l1`` grow linearly."""
        return _THRESHOLDS[self.options.huber_schedule](self)[:, None, None, None]


#: Returns the error of a prediction ``[B, C, H, W]``, given the prediction, the target and the step.
ErrorFunction = Callable[[Tensor, Tensor, Step], Tensor]


def denoising_losses(
    model: NoiseProcess, predicted: Tensor, batch: Mapping[str, Any], options: LossConfig = PLAIN
) -> Tensor:
    """Return the loss per sample ``[B]`` of a prediction ``[B, C, H, W]``: the mean error, weighted.

    ``batch`` holds ``latents`` and ``noise`` ``[B, C, H, W]``, ``timesteps`` ``[B]`` and optionally ``mask``
    ``[B, 1, H, W]``, by which the error is weighted.
    """
    timesteps = batch["timesteps"]
    target_BCHW = model.target(batch["latents"], batch["noise"], timesteps)
    measure: ErrorFunction = LOSSES.get(options.loss_type)
    error_BCHW = measure(predicted.float(), target_BCHW.float(), Step(model, timesteps, options))
    if batch.get("mask") is not None:
        error_BCHW = error_BCHW * batch["mask"]
    loss_B = error_BCHW.flatten(1).mean(1)
    for key, weight in WEIGHTS.items():
        if value := getattr(options, key):
            snr_B = model.signal_to_noise(timesteps, needed_by=f"train.{key}")
            loss_B = loss_B * weight.compute(snr_B, model.prediction_type, value)
    return loss_B


def check_loss(model: NoiseProcess, options: LossConfig) -> None:
    """Raise ModelError for options of the loss that the model's schedule or prediction type does not support."""
    for key, weight in WEIGHTS.items():
        if getattr(options, key):
            first = model.even_timesteps(1)
            model.signal_to_noise(first, needed_by=f"train.{key}")
            if model.prediction_type not in weight.prediction_types:
                raise ModelError(
                    f"train.{key} is defined for models that predict {' or '.join(weight.prediction_types)}, and "
                    f"{model.folder} predicts {model.prediction_type}; remove it"
                )
    measure: ErrorFunction = LOSSES.get(options.loss_type)
    measure(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), Step(model, model.even_timesteps(1), options))


# Error functions


def l2(predicted: Tensor, target: Tensor, step: Step) -> Tensor:
    """Return the squared error ``[B, C, H, W]``."""
    return F.mse_loss(predicted, target, reduction="none")


def l1(predicted: Tensor, target: Tensor, step: Step) -> Tensor:
    """Return the absolute error ``[B, C, H, W]``."""
    return F.l1_loss(predicted, target, reduction="none")


def huber(predicted: Tensor, target: Tensor, step: Step) -> Tensor:
    """Return the pseudo-Huber error ``2 c (sqrt(d^2 + c^2) - c)``: d^2 for small d, ``2 c |d|`` for large.

    Source: Khrapov et al. 2024 (arXiv 2403.16728), and kohya's ``conditional_loss``.
    """
    threshold = step.threshold
    return threshold * _rounded(predicted - target, threshold)


def smooth_l1(predicted: Tensor, target: Tensor, step: Step) -> Tensor:
    """Return ``2 (sqrt(d^2 + c^2) - c)``: ``d^2 / c`` for small d, ``2 |d|`` for large, as kohya's ``smooth_l1``."""
    return _rounded(predicted - target, step.threshold)


def _rounded(error: Tensor, threshold: Tensor) -> Tensor:
    return 2 * (torch.sqrt(error**2 + threshold**2) - threshold)


# Thresholds by timestep. Source: Khrapov et al. 2024, section 4, and kohya's `get_huber_threshold_if_needed`.


def _constant(step: Step) -> Tensor:
    c, scale = step.options.huber_c, step.options.huber_scale
    return torch.full_like(step.timesteps, c * scale, dtype=torch.float32)


def _exponential(step: Step) -> Tensor:
    count = step.model.num_timesteps
    if count is None:
        raise ModelError(
            f"{step.model.title} has no numbered timesteps, which train.huber_schedule: exponential needs; use constant"
        )
    return torch.exp(math.log(step.options.huber_c) / count * step.timesteps) * step.options.huber_scale


def _by_snr(step: Step) -> Tensor:
    snr = step.model.signal_to_noise(step.timesteps, needed_by="train.huber_schedule: snr")
    c = step.options.huber_c
    return (1 - c) / (1 + snr**-0.5) ** 2 + c


_THRESHOLDS: dict[str, Callable[[Step], Tensor]] = {
    "constant": _constant,
    "exponential": _exponential,
    "snr": _by_snr,
}


# Weights by signal-to-noise ratio


class Weight(NamedTuple):
    """A weight ``compute(snr [B], prediction type, value of the key)`` -> ``[B]``, for some prediction types."""

    compute: Callable[[Tensor, str, Any], Tensor]
    prediction_types: tuple[str, ...]


def min_snr_weight(snr: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Return min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for velocity, min(SNR, gamma) for sample prediction.

    Source: Hang et al. 2023 (arXiv 2303.09556), eq. 4.
    """
    clipped = snr.clamp(max=gamma)
    if prediction_type == "v_prediction":
        return clipped / (snr + 1)
    # With zero terminal SNR the last timestep has SNR 0, where epsilon prediction learns nothing about the image.
    return (
        clipped if prediction_type == "sample" else torch.where(snr > 0, clipped / snr.clamp(min=1e-12), 0.0)
    )


def velocity_as_noise_weight(snr: Tensor, prediction_type: str, value: bool) -> Tensor:
    """Return SNR / (SNR + 1): with it, the squared error of a velocity is that of the noise which it implies."""
    clipped = snr.clamp(max=LARGEST_SNR)
    return clipped / (clipped + 1)


def added_velocity_weight(snr: Tensor, prediction_type: str, value: float) -> Tensor:
    """Return 1 + value * (SNR + 1) / SNR: the loss of the noise plus ``value`` times that of the velocity."""
    return 1 + value / velocity_as_noise_weight(snr, prediction_type, True)


def debiased_weight(snr: Tensor, prediction_type: str, value: bool) -> Tensor:
    """Return 1 / sqrt(SNR) for epsilon, 1 / (SNR + 1) for velocity.

    Source: Yu et al. 2023 (arXiv 2310.08442); that of the velocity is of kohya's ``apply_debiased_estimation``.
    """
    clipped = snr.clamp(max=LARGEST_SNR)
    return 1 / (clipped + 1) if prediction_type == "v_prediction" else 1 / clipped.sqrt()


#: By the key of the recipe, in the order of kohya's scripts; all that are set are multiplied.
WEIGHTS: dict[str, Weight] = {
    "snr_gamma": Weight(min_snr_weight, ("epsilon", "v_prediction", "sample")),
    "scale_v_pred_loss_like_noise_pred": Weight(velocity_as_noise_weight, ("v_prediction",)),
    "v_pred_like_loss": Weight(added_velocity_weight, ("epsilon",)),
    "debiased_estimation_loss": Weight(debiased_weight, ("epsilon", "v_prediction")),
}
