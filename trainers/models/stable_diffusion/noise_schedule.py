"""Applies the options of the recipe's ``model:`` section to a model's noise schedule."""

from __future__ import annotations

from typing import Any

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.config.model import ModelConfig


def noise_schedule(scheduler: Any, config: ModelConfig, name: str) -> Any:
    """Return the schedule with the section's prediction type and zero terminal SNR.

    Source of zero terminal SNR: Lin et al. 2023 (arXiv 2305.08891). Raises ModelError if it is combined with epsilon
    prediction: at a timestep of pure noise, predicting the noise carries no information about the image.
    """
    changes: dict[str, Any] = {}
    if config.prediction_type is not None:
        changes["prediction_type"] = config.prediction_type
    if config.rescale_betas_zero_snr:
        # With leading spacing samplers never use the last timestep, which this setting changes (section 3.3).
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if not changes:
        return scheduler
    changed = type(scheduler).from_config(scheduler.config, **changes)
    if config.rescale_betas_zero_snr and changed.config.prediction_type == "epsilon":
        raise ModelError(
            f"model.rescale_betas_zero_snr needs a model that predicts velocity, and {name} predicts noise; set "
            "model.prediction_type: v_prediction, which takes thousands of training steps to learn, or leave it out"
        )
    return changed
