"""The keys of the ``train:`` section that choose the denoising loss, and the registry of loss types."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field

from dreamfleet.datasets.config_base import Section
from dreamfleet.datasets.registry import EntryName, Registry

#: Error functions by name (see ``trainers.models.denoising_loss``); an installed package adds one through the
#: entry-point group ``dreamfleet.losses``.
LOSSES: Registry[Any] = Registry(
    "loss",
    group="dreamfleet.losses",
    builtin={
        name: f"dreamfleet.trainers.models.denoising_loss:{name}"
        for name in ("l2", "l1", "huber", "smooth_l1")
    },
)
_OTHER_NAMES = {"mse": "l2", "mae": "l1"}


def _read_name(value: Any) -> Any:
    name = value.lower() if isinstance(value, str) else value
    return _OTHER_NAMES.get(name, name)


class LossConfig(Section):
    """How the error of a prediction becomes the loss of a sample: its function, and its weight by timestep."""

    loss_type: Annotated[str, BeforeValidator(_read_name), AfterValidator(EntryName(LOSSES, loads=False))] = (
        Field(
            "l2",
            description="error of the prediction; held-out losses are always l2, so that runs can be compared",
        )
    )
    huber_schedule: Literal["snr", "exponential", "constant"] = Field(
        "snr", description="threshold of `huber` and `smooth_l1` by timestep, as in kohya's scripts"
    )
    huber_c: float = Field(
        0.1, gt=0, description="threshold of `huber` and `smooth_l1` at the noisiest timestep"
    )
    huber_scale: float = Field(
        1.0, gt=0, description="factor of the threshold with huber_schedule exponential and constant"
    )
    snr_gamma: float | None = Field(
        None,
        gt=0,
        validation_alias=AliasChoices("snr_gamma", "min_snr_gamma"),
        description="min-SNR loss weighting (Hang et al. 2023); the paper uses 5",
    )
    debiased_estimation_loss: bool = Field(
        False,
        validation_alias=AliasChoices("debiased_estimation_loss", "use_debiased_estimation_loss"),
        description="weight the loss by 1 / sqrt(SNR) (Yu et al. 2023), with velocity by 1 / (SNR + 1) as kohya does",
    )
    scale_v_pred_loss_like_noise_pred: bool = Field(
        False,
        description="weight the loss of a velocity by SNR / (SNR + 1), which makes it that of the predicted noise",
    )
    v_pred_like_loss: float = Field(
        0.0,
        ge=0,
        description="weight of an added loss that is that of a predicted velocity; needs a model that predicts noise",
    )
