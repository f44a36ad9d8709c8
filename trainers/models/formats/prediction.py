"""What a single file's U-Net predicts, noise or velocity: keys do not tell it, other signs do."""

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


def told_schedule(state: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> Config:
    """Read what is said of a file's noise: changes to its family's scheduler config.

    The `.yaml` beside it counts most, then modelspec's entry in its header (kohya's), then the empty tensors `v_pred`
    and `ztsnr`, which ComfyUI goes by. Raises FormatError for a `.yaml` that cannot be read.
    """
    changes: Config = {}
    if _VELOCITY in state:
        changes = {"prediction_type": "v_prediction"} | ({ZERO_SNR: True} if _ENDS_IN_NOISE in state else {})
    if (told := metadata.get("modelspec.prediction_type", "")) in _MODELSPEC:
        changes["prediction_type"] = _MODELSPEC[told]
    changes |= schedule_beside(path)
    if changes.get(ZERO_SNR):
        changes["timestep_spacing"] = "trailing"
    return changes


def prediction_marks(scheduler: Mapping[str, Any], family: Family) -> dict[str, Tensor]:
    """Return the empty tensors that tell ComfyUI what an SDXL's U-Net predicts; of other families it reads none."""
    if family != "sdxl" or scheduler["prediction_type"] != "v_prediction":
        return {}
    names = [_VELOCITY, *([_ENDS_IN_NOISE] if scheduler.get(ZERO_SNR) else [])]
    return {name: torch.empty(0) for name in names}


@torch.no_grad()
def predicts_velocity(unet: Any) -> bool:
    """Try whether Stable Diffusion 2's U-Net predicts velocity, as the webui does.

    At the last timestep what enters is nearly all noise: one that predicts noise gives about the same back, one that
    predicts velocity nearly the negative image (webui, modules/sd_models_config.py, sd2's v-parameterization).
    """
    side = 2 ** (len(unet.config.block_out_channels) - 1)
    latents = torch.full((1, unet.config.in_channels, side, side), 0.5, dtype=unet.dtype)
    context = torch.full((1, 2, unet.config.cross_attention_dim), 0.5, dtype=unet.dtype)
    output = unet(latents, torch.tensor([999]), context, return_dict=False)[0]
    return bool((output - latents).mean() < -1)
