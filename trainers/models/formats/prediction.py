"""Determines whether the U-Net of a single file predicts noise or velocity, which its keys do not show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamfleet.trainers.models.formats.ldm_names import Config, Family
from dreamfleet.trainers.models.formats.original_config import ZERO_SNR, schedule_beside

_MODELSPEC = {"v": "v_prediction", "epsilon": "epsilon"}
_VELOCITY, _ENDS_IN_NOISE = "v_pred", "ztsnr"  # names of empty tensors


def declared_schedule(state: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> Config:
    """Return the changes to the family's scheduler config that a single file or its `.yaml` declares.

    In order of precedence: the `.yaml` beside the file, the modelspec entry in its header (written by kohya's scripts),
    and the empty tensors `v_pred` and `ztsnr` (ComfyUI). Raises FormatError for a `.yaml` that cannot be read.
    """
    changes: Config = {}
    if _VELOCITY in state:
        changes = {"prediction_type": "v_prediction"} | ({ZERO_SNR: True} if _ENDS_IN_NOISE in state else {})
    if (declared := metadata.get("modelspec.prediction_type", "")) in _MODELSPEC:
        changes["prediction_type"] = _MODELSPEC[declared]
    changes |= schedule_beside(path)
    if changes.get(ZERO_SNR):
        changes["timestep_spacing"] = "trailing"
    return changes


def prediction_marks(scheduler: Mapping[str, Any], family: Family) -> dict[str, Tensor]:
    """Return the empty tensors that mark an SDXL model's prediction type for ComfyUI; {} for other families."""
    if family != "sdxl" or scheduler["prediction_type"] != "v_prediction":
        return {}
    names = [_VELOCITY, *([_ENDS_IN_NOISE] if scheduler.get(ZERO_SNR) else [])]
    return {name: torch.empty(0) for name in names}


@torch.no_grad()
def predicts_velocity(unet: Any) -> bool:
    """Return whether a Stable Diffusion 2 U-Net predicts velocity, by running it once, as the webui does.

    At the last timestep the input is almost pure noise. A U-Net that predicts noise returns approximately its input;
    one that predicts velocity returns approximately the negative of the image. Source: webui,
    modules/sd_models_config.py, is_using_v_parameterization_for_sd2.
    """
    side = 2 ** (len(unet.config.block_out_channels) - 1)
    latents = torch.full((1, unet.config.in_channels, side, side), 0.5, dtype=unet.dtype)
    context = torch.full((1, 2, unet.config.cross_attention_dim), 0.5, dtype=unet.dtype)
    output = unet(latents, torch.tensor([999]), context, return_dict=False)[0]
    return bool((output - latents).mean() < -1)
