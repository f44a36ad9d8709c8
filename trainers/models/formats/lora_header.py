"""Creates and reads the text entries in the headers of LoRA files: kohya's (``ss_``), modelspec's and dreamfleet's."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamfleet.datasets.errors import FormatError
from dreamfleet.trainers.models.formats.ldm_names import Family

PREDICTION = "modelspec.prediction_type"  # in both layouts: "v" or "epsilon"
PEFT = "lora_adapter_metadata"  # diffusers' entry with peft's config of each part

_VERSIONS = {  # kohya's names of a family, for epsilon and for velocity prediction
    "sd1": ("sd_v1", "sd_v1_v"),
    "sd2": ("sd_v2", "sd_v2_v"),
    "sdxl": ("sdxl_base_v1-0", "sdxl_base_v1-0"),
}
_ARCHITECTURES = {  # modelspec's names of a family
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
)  # valid for one file only


def own_entries(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the entries that remain valid when the file is converted to another layout."""
    return {key: value for key, value in metadata.items() if key not in _PASSING}


def kohya_entries(
    metadata: Mapping[str, str],
    *,
    name: str,
    family: Family,
    ranks: Sequence[tuple[int, float]],
    has_convolutions: bool,
    algorithm: str | None = None,
) -> dict[str, str]:
    """Return the header entries that kohya's scripts, the webui and ComfyUI read or display.

    ``metadata``: the LoRA's existing entries. ``ranks``: (rank, alpha) of every layer, of which the header contains
    only the most common. ``has_convolutions``: whether a layer has a kernel larger than 1 x 1. ``algorithm``:
    LyCORIS's, such as lokr.
    """
    velocity = is_for_velocity(metadata)
    rank, alpha = Counter(ranks).most_common(1)[0][0]
    entries = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": _VERSIONS[family][velocity],
        "ss_v2": str(family == "sd2"),
        "ss_output_name": name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{_ARCHITECTURES[family][velocity]}/lora",
        "modelspec.title": name,
    }
    if has_convolutions:
        entries["ss_network_args"] = json.dumps({"conv_dim": str(rank), "conv_alpha": str(alpha)})
    if algorithm is not None:
        entries |= {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": algorithm})}
    for ours, theirs in (("dreamfleet_base_model", "ss_sd_model_name"), ("dreamfleet_step", "ss_steps")):
        if ours in metadata:
            entries[theirs] = metadata[ours]
    return entries


def is_for_velocity(metadata: Mapping[str, str]) -> bool:
    """Return whether a LoRA's header states that its base model predicts velocity."""
    return (
        metadata.get(PREDICTION) == "v"
        or metadata.get("ss_base_model_version", "").endswith("_v")
        or metadata.get("modelspec.architecture", "").startswith("stable-diffusion-v2-768-v")
    )


class PeftAlphas:
    """The alpha of each layer in the header entry that diffusers writes (peft's config)."""

    def __init__(self, header: Mapping[str, str], path: Path):
        try:
            entries = json.loads(header.get(PEFT, "{}"))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path}: its header is damaged ({error}).") from error
        self._entries: dict[str, Any] = entries if isinstance(entries, dict) else {}

    def of(self, layer: str, rank: int) -> Any:
        """Return the alpha of a layer (before division by the rank); ``rank`` is that of its matrices."""
        part, _, module = layer.partition(".")
        alpha = self._entries.get(f"{part}.lora_alpha", rank)
        patterns = self._entries.get(f"{part}.alpha_pattern")
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            plain = pattern.removeprefix(
                "^"
            )  # peft treats patterns as regular expressions; untrusted ones are compared as text instead
            if f".{module}".endswith(f".{plain}"):
                alpha = value
                break
        scaled = self._entries.get(f"{part}.use_rslora") is True and type(alpha) in (int, float)
        return alpha * math.sqrt(rank) if scaled else alpha
