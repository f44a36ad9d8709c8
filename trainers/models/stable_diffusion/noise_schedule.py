"""A model's noise schedule, changed as the ``model:`` section says."""

from __future__ import annotations

from typing import Any

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.config.model import ModelConfig


def noise_schedule(scheduler: Any, config: ModelConfig, name: str) -> Any:
    """Change a model's noise schedule as its section says; what samples with it then takes trailing steps.

    Raises ModelError for zero terminal SNR without v-prediction: from noise alone no noise can be told apart.
    """
    changes: dict[str, Any] = {}
    if config.prediction_type is not None:
        changes["prediction_type"] = config.prediction_type
    if config.rescale_betas_zero_snr:
        # Leading steps never reach the last timestep, the one that this is about (section 3.3 there).
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if not changes:
        return scheduler
    changed = type(scheduler).from_config(scheduler.config, **changes)
    if config.rescale_betas_zero_snr and changed.config.prediction_type == "epsilon":
        raise ModelError(
            f"model.rescale_betas_zero_snr needs a model that predicts velocity, and {name} predicts noise; set "
            "model.prediction_type: v_prediction, which it then has to learn (thousands of steps), or leave it out"
        )
    return changed
