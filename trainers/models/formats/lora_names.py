"""Converts LoRA layer names between diffusers' (``unet.a.b.to_q.lora_A.weight``) and kohya's (``lora_unet_a_b_to_q``).

Internally the name of a layer is its part and module as in diffusers, in text encoders with ``text_model``.
Sources: diffusers, `loaders/lora_conversion_utils.py`; kohya-ss/sd-scripts, `networks/lora.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dreamfleet.datasets.errors import FormatError
from dreamfleet.trainers.models.formats.ldm_names import SDXL_CONFIGS, unet_key
from dreamfleet.trainers.models.formats.lycoris import FACTOR_KEYS

PARTS = ("unet", "text_encoder", "text_encoder_2")
STANDARD_LAYERS = 2  # layers per block in the U-Nets of SD 1.x, 2.x and SDXL

# Kohya replaces "." by "_", so names that contain an underscore must be known to convert them back.
_WORDS = (
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "proj_in", "proj_out", "to_q", "to_k", "to_v",
    "to_out", "time_emb_proj", "conv_in", "conv_out", "conv_shortcut", "time_embedding", "add_embedding", "linear_1",
    "linear_2", "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "text_projection",
    "input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers", "skip_connection",
    "time_embed", "label_emb",
)  # fmt: skip
_PIECES = re.compile(rf"(?:^|_)({'|'.join(_WORDS)}|[^_]+)(?=_|$)")
_LDM_TOP = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_LDM_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_LDM_BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d{1,3})\.(\d{1,3})\.(.+)")
_LDM_MIDDLE = re.compile(r"middle_block\.([012])\.(.+)")


def kohya_name(layer: str, *, sdxl: bool, unet_config: Mapping[str, Any] | None = None) -> str:
    """Return kohya's name of a layer: diffusers' with underscores, or in SDXL's U-Net that of Stability's code.

    ``unet_config``: needed if SDXL's U-Net does not have its usual blocks. Raises FormatError for a layer that has no
    name in kohya's layout.
    """
    part, _, module = layer.partition(".")
    if part == "unet":
        if sdxl:
            config = dict(unet_config or SDXL_CONFIGS["unet"])
            module = unet_key(f"{module}.weight", config).removesuffix(".weight")
        return f"lora_unet_{module.replace('.', '_')}"
    if part not in PARTS:
        raise FormatError(f"kohya's layout has no name for {layer!r}.")
    prefix = ("lora_te1" if sdxl else "lora_te") if part == "text_encoder" else "lora_te2"
    return f"{prefix}_{module.replace('.', '_')}"


def layer_of_kohya(name: str, *, layers_per_block: int = STANDARD_LAYERS) -> str | None:
    """Return the layer of a kohya name with diffusers' or Stability's block names; None for any other name."""
    for prefix, part in (
        ("lora_unet_", "unet"),
        ("lora_te_", "text_encoder"),
        ("lora_te1_", "text_encoder"),
        ("lora_te2_", "text_encoder_2"),
    ):
        if name.startswith(prefix):
            module = ".".join(_PIECES.findall(name.removeprefix(prefix)))
            if part == "unet":
                module = diffusers_block(module, layers_per_block)
            return f"{part}.{module}" if module else None
    return None


def diffusers_block(module: str, layers_per_block: int) -> str:
    """Return diffusers' name of a U-Net module given by either name, such as ``input_blocks.4.1.proj_in``."""
    if module in _LDM_TOP:
        return _LDM_TOP[module]
    if match := _LDM_MIDDLE.fullmatch(module):
        slot, rest = int(match[1]), match[2]
        if slot == 1:
            return f"mid_block.attentions.0.{rest}"
        return f"mid_block.resnets.{slot // 2}.{_LDM_RESNET.get(rest, rest)}"
    if not (match := _LDM_BLOCK.fullmatch(module)):
        return module
    side, number, slot, rest = match[1], int(match[2]), int(match[3]), match[4]
    if side == "input_blocks":
        block, layer = divmod(number - 1, layers_per_block + 1)
        if rest == "op":
            return f"down_blocks.{block}.downsamplers.0.conv"
        place = f"down_blocks.{block}"
    else:
        block, layer = divmod(number, layers_per_block + 1)
        if rest == "conv":
            return f"up_blocks.{block}.upsamplers.0.conv"
        place = f"up_blocks.{block}"
    if slot == 0:
        return f"{place}.resnets.{layer}.{_LDM_RESNET.get(rest, rest)}"
    return f"{place}.attentions.{layer}.{rest}"


# diffusers' endings of keys for the two matrices, the newest form first.
_DIFFUSERS_ENDS: tuple[tuple[re.Pattern[str], dict[str, str]], ...] = (
    (re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight"), {"A": "down", "B": "up"}),
    (re.compile(r"(.+)\.lora(?:_linear_layer)?\.(down|up)\.weight"), {}),
    (re.compile(r"(.+)_lora\.(down|up)\.weight"), {}),
    (re.compile(r"(.+)\.(alpha)"), {}),
    (re.compile(r"(.+)\.lora_(magnitude)_vector(?:\.default)?(?:\.weight)?"), {}),
)


def layer_of_diffusers(key: str) -> tuple[str, str] | None:
    """Return (layer, ``down``, ``up``, ``alpha`` or ``magnitude``) of a key in diffusers' layout; None for others."""
    for pattern, names in _DIFFUSERS_ENDS:
        if match := pattern.fullmatch(key):
            layer, which = match[1].replace(".processor.", "."), names.get(match[2], match[2])
            part, _, module = layer.partition(".")
            if part not in PARTS:
                part, module = "unet", layer  # diffusers' oldest form contains only the U-Net
            if module.endswith(".to_out"):
                module += ".0"
            if part != "unet" and not module.startswith("text_model."):
                module = f"text_model.{module}"
            return f"{part}.{module}", which
    return None


def layer_of_key(key: str, *, layers_per_block: int = STANDARD_LAYERS) -> tuple[str, str] | None:
    """Return (layer, ``down``, ``up``, ``alpha``, ``magnitude``, LyCORIS's key) of a key in either layout, or None."""
    name, _, end = key.partition(".")
    ends = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha", "dora_scale": "magnitude"}
    ends |= {key: key for key in FACTOR_KEYS}
    if name.startswith("lora_"):
        layer = layer_of_kohya(name, layers_per_block=layers_per_block)
        return (layer, ends[end]) if layer and end in ends else None
    return layer_of_diffusers(key)
