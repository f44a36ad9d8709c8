"""Text entries in the headers of LoRA files: kohya's (``ss_``), modelspec's and ours."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dreamfleet.trainers.models.formats.ldm_names import Family

if TYPE_CHECKING:
    from dreamfleet.trainers.models.formats.lora import LoraFile

PREDICTION = "modelspec.prediction_type"  # in both layouts: "v" or "epsilon"
PEFT = "lora_adapter_metadata"  # diffusers': peft's config of each part

_VERSIONS = {  # kohya's name of a family: where the U-Net predicts noise, and where velocity
    "sd1": ("sd_v1", "sd_v1_v"),
    "sd2": ("sd_v2", "sd_v2_v"),
    "sdxl": ("sdxl_base_v1-0", "sdxl_base_v1-0"),
}
_ARCHITECTURES = {  # modelspec's
    "sd1": ("stable-diffusion-v1", "stable-diffusion-v1"),
    "sd2": ("stable-diffusion-v2-512", "stable-diffusion-v2-768-v"),
    "sdxl": ("stable-diffusion-xl-v1-base", "stable-diffusion-xl-v1-base"),
}
_PASSING = (
    PEFT,
    "format",
    "ss_network_alpha",
    "sshs_model_hash",
    "sshs_legacy_hash",
)  # true of one file alone


def own_entries(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the entries that stay true in another layout."""
    return {key: value for key, value in metadata.items() if key not in _PASSING}


def kohya_entries(file: LoraFile, family: Family) -> dict[str, str]:
    """Return the entries that kohya's scripts, the webui and ComfyUI show or read."""
    velocity = is_for_velocity(file.metadata)
    rank, alpha = Counter((m.rank, m.alpha) for m in file.layers.values()).most_common(1)[0][0]
    told = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": _VERSIONS[family][velocity],
        "ss_v2": str(family == "sd2"),
        "ss_output_name": file.name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{_ARCHITECTURES[family][velocity]}/lora",
        "modelspec.title": file.name,
    }
    if any(matrices.down.shape[2:].numel() > 1 for matrices in file.layers.values()):
        told["ss_network_args"] = json.dumps({"conv_dim": str(rank), "conv_alpha": str(alpha)})
    for ours, theirs in (("dreamfleet_base_model", "ss_sd_model_name"), ("dreamfleet_step", "ss_steps")):
        if ours in file.metadata:
            told[theirs] = file.metadata[ours]
    return told


def is_for_velocity(metadata: Mapping[str, str]) -> bool:
    """Say whether a LoRA's entries tell that it was made for a U-Net that predicts velocity."""
    return (
        metadata.get(PREDICTION) == "v"
        or metadata.get("ss_base_model_version", "").endswith("_v")
        or metadata.get("modelspec.architecture", "").startswith("stable-diffusion-v2-768-v")
    )
