"""The blocks of Stable Diffusion's U-Net as Stability's code and kohya's scripts number them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dreamfleet.datasets.errors import ModelError

#: The sections of a U-Net in order. Blocks are (section, number in it).
SECTIONS = ("embed", "down", "mid", "up", "out")
_EDGES = {
    "time_embedding": ("embed", 0),
    "add_embedding": ("embed", 0),
    "conv_in": ("down", 0),
    "conv_norm_out": ("out", 0),
    "conv_out": ("out", 0),
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)")


def count_blocks(config: Mapping[str, Any], *, is_sdxl: bool) -> dict[str, int]:
    """Return the number of blocks of each section, of a U-Net with this diffusers config."""
    size = _layers(config) + 1
    down, up = len(config["down_block_types"]) * size, len(config["up_block_types"]) * size
    return {"embed": 1, "down": down, "mid": 3 if is_sdxl else 1, "up": up, "out": 1}


def block_of(layer: str, config: Mapping[str, Any], *, is_sdxl: bool) -> tuple[str, int]:
    """Return the section and number of the block of a layer, named as in diffusers.

    ``input_blocks.N`` is (down, N): a ResNet with its attention is a block, as is a downsampler. SDXL's middle is
    counted as three blocks, that of other models as one. Source: kohya-ss/sd-scripts, ``networks/lora.py:
    get_block_index``.
    """
    size = _layers(config) + 1
    if found := _EDGES.get(layer.partition(".")[0]):
        return found
    if match := _MIDDLE.match(layer):
        slot = 1 if match[1] == "attentions" else 2 * int(match[2])
        return "mid", slot if is_sdxl else 0
    if not (match := _BLOCK.match(layer)):
        raise ModelError(f"the layer {layer} is in none of the U-Net's blocks")
    section, block, kind, number = match[1], int(match[2]), match[3], int(match[4])
    within = number if kind in ("resnets", "attentions") else size - 1
    return section, block * size + within + (section == "down")


def _layers(config: Mapping[str, Any]) -> int:
    layers = config["layers_per_block"]
    if not isinstance(layers, int):
        raise ModelError("learning rates by block need a U-Net with equally many layers in each block")
    return layers
