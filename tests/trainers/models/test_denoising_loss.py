"""Test that losses equal the formulas of other trainers at fixed noise, computed here value by value."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.config.loss import LOSSES, LossConfig
from dreamfleet.trainers.models.denoising_loss import Step, check_loss
from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion

TIMESTEPS = (0, 7, 250, 640, 999)


def alphas_cumprod() -> list[float]:
    """The schedule of Stable Diffusion 1.x, `scaled_linear` from 0.00085 to 0.012, in double precision."""
    low, high, product, found = math.sqrt(0.00085), math.sqrt(0.012), 1.0, []
    for t in range(1000):
        product *= 1 - (low + (high - low) * t / 999) ** 2
        found.append(product)
    return found


def model_of(prediction_type: str) -> StableDiffusion:
    model = tiny_model()
    model.scheduler = type(model.scheduler).from_config(
        model.scheduler.config, prediction_type=prediction_type
    )
    return model


def batch_of(seed: int = 0) -> tuple[torch.Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    predicted, latents, noise = torch.randn(3, len(TIMESTEPS), 4, 2, 3, generator=generator)
    return predicted, {"latents": latents, "noise": noise, "timesteps": torch.tensor(TIMESTEPS)}


def expected_threshold(t: int, schedule: str, c: float, scale: float) -> float:
    """kohya-ss/sd-scripts, library/train_util.py, get_huber_threshold_if_needed: `huber_scale` is unused with snr."""
    if schedule == "exponential":
        return float(c ** (t / 1000)) * scale
    if schedule == "snr":
        abar = alphas_cumprod()[t]
        return (1 - c) / (1 + math.sqrt((1 - abar) / abar)) ** 2 + c
    return c * scale


def expected_error(d: float, loss_type: str, c: float) -> float:
    """kohya-ss/sd-scripts, library/train_util.py, conditional_loss."""
    if loss_type == "l2":
        return d * d
    if loss_type == "l1":
        return abs(d)
    rounded = 2 * (math.sqrt(d * d + c * c) - c)
    return rounded * c if loss_type == "huber" else rounded


@pytest.mark.parametrize("schedule", ["snr", "exponential", "constant"])
@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "smooth_l1"])
def test_loss_types_equal_those_of_kohyas_scripts(loss_type: str, schedule: str) -> None:
    predicted, batch = batch_of()
    options = LossConfig(loss_type=loss_type, huber_schedule=schedule, huber_c=0.15, huber_scale=1.7)
    found = model_of("epsilon").loss(predicted, batch, options)
    for row, t in enumerate(TIMESTEPS):
        c = expected_threshold(t, schedule, 0.15, 1.7)
        errors = (predicted[row] - batch["noise"][row]).double().flatten().tolist()
        expected = sum(expected_error(d, loss_type, c) for d in errors) / len(errors)
        assert float(found[row]) == pytest.approx(expected, rel=2e-5), (loss_type, schedule, t)


def expected_weight(t: int, prediction_type: str, key: str, value: Any) -> float:
    """kohya-ss/sd-scripts, library/custom_train_functions.py: apply_snr_weight, get_snr_scale, ..."""
    abar = alphas_cumprod()[t]
    snr, velocity = abar / (1 - abar), prediction_type == "v_prediction"
    most = min(snr, 1000.0)
    scale = most / (most + 1)
    return {
        "snr_gamma": min(snr, float(value)) / (snr + 1 if velocity else snr),
        "scale_v_pred_loss_like_noise_pred": scale,
        "v_pred_like_loss": 1 + float(value) / scale,
        "debiased_estimation_loss": 1 / (most + 1) if velocity else most**-0.5,
    }[key]


@pytest.mark.parametrize(
    ("prediction_type", "options"),
    [
        ("epsilon", {"snr_gamma": 5.0}),
        ("v_prediction", {"snr_gamma": 5.0}),
        ("epsilon", {"debiased_estimation_loss": True}),
        ("v_prediction", {"debiased_estimation_loss": True}),
        ("v_prediction", {"scale_v_pred_loss_like_noise_pred": True}),
        ("epsilon", {"v_pred_like_loss": 0.3}),
        ("v_prediction", {"snr_gamma": 1.0, "scale_v_pred_loss_like_noise_pred": True}),
        ("epsilon", {"snr_gamma": 5.0, "debiased_estimation_loss": True, "v_pred_like_loss": 0.5}),
    ],
)
def test_weights_equal_those_of_kohyas_scripts(prediction_type: str, options: dict[str, Any]) -> None:
    predicted, batch = batch_of()
    model = model_of(prediction_type)
    plain, weighted = model.loss(predicted, batch), model.loss(predicted, batch, LossConfig(**options))
    for row, t in enumerate(TIMESTEPS):
        expected = math.prod(expected_weight(t, prediction_type, *item) for item in options.items())
        assert float(weighted[row] / plain[row]) == pytest.approx(expected, rel=1e-4), t


def test_a_velocity_loss_scaled_like_noise_is_the_loss_of_the_implied_noise() -> None:
    predicted, batch = batch_of()
    model = model_of("v_prediction")
    options = LossConfig(scale_v_pred_loss_like_noise_pred=True)
    found = model.loss(predicted, batch, options)
    for row, t in enumerate(
        TIMESTEPS[2:], start=2
    ):  # the ratio at the first timesteps is above the bound of 1000
        signal, noise = math.sqrt(alphas_cumprod()[t]), math.sqrt(1 - alphas_cumprod()[t])
        noisy = signal * batch["latents"][row] + noise * batch["noise"][row]
        implied = signal * predicted[row] + noise * noisy  # Salimans & Ho 2022, appendix D
        assert float(found[row]) == pytest.approx(
            float((implied - batch["noise"][row]).square().mean()), rel=1e-3
        )


@pytest.mark.parametrize(
    ("prediction_type", "key"),
    [
        ("epsilon", "scale_v_pred_loss_like_noise_pred"),
        ("sample", "debiased_estimation_loss"),
        ("v_prediction", "v_pred_like_loss"),
    ],
)
def test_weights_are_refused_for_other_prediction_types(prediction_type: str, key: str) -> None:
    with pytest.raises(ModelError, match=f"train.{key}.*predicts {prediction_type}"):
        check_loss(model_of(prediction_type), LossConfig.model_validate({key: 1}))


def test_losses_of_other_packages_are_found_by_name() -> None:
    def cubed(predicted: torch.Tensor, target: torch.Tensor, step: Step) -> torch.Tensor:
        return (predicted - target).abs() ** 3

    LOSSES.register("cubed")(cubed)
    try:
        predicted, batch = batch_of()
        found = model_of("epsilon").loss(predicted, batch, LossConfig(loss_type="cubed"))
        expected = (predicted - batch["noise"]).abs().pow(3).mean(dim=(1, 2, 3))
        assert torch.allclose(found, expected)
    finally:
        LOSSES.unregister("cubed")
