"""Names of Stable Diffusion's parameters in single files (LDM, webui) for diffusers' parts of any number of blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dreamfleet.datasets.errors import FormatError

PARTS = ("unet", "vae", "text_encoder")
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.text_model.",
}

SD2_TEXT_PREFIX = "cond_stage_model.model."

Config = dict[str, Any]

SD1_CONFIGS: dict[str, Config] = {
    "unet": {
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "vae": {
        "sample_size": 512,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    },
    "scheduler": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
    },
}

_UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_SD2_TEXT = (
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^final_layer_norm", "ln_final"),
    (r"^encoder\.layers", "transformer.resblocks"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"self_attn\.[qkv]_proj\.(weight|bias)", r"attn.in_proj_\1"),
)
_UNET_BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)")
_UNET_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_VAE_BLOCK = re.compile(r"(\w+)\.(down|up)_blocks\.(\d+)\.(resnets|\w+samplers)\.(\d+)\.(.+)")
_VAE_MIDDLE = re.compile(r"(\w+)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def file_key(part: str, key: str, config: Config) -> str:
    """Give the whole name in a single file of a parameter of one of `PARTS`.

    Raises FormatError for a parameter that the SD1 layout has no name for.
    """
    names = {"unet": unet_key, "vae": vae_key, "text_encoder": lambda key, _: text_key(key)}
    return PREFIXES[part] + names[part](key, config)


def unet_key(key: str, config: Config) -> str:
    """Give LDM's name of a parameter of diffusers' `UNet2DConditionModel` with this config."""
    stem, end = key.rsplit(".", 1)
    if stem in _UNET_TOP:
        return f"{_UNET_TOP[stem]}.{end}"
    if match := _UNET_MIDDLE.fullmatch(key):
        kind, index, rest = match[1], int(match[2]), match[3]
        return f"middle_block.{2 * index + (kind == 'attentions')}.{_resnet(rest) if kind == 'resnets' else rest}"
    if not (match := _UNET_BLOCK.fullmatch(key)):
        raise FormatError(f"the U-Net's parameter {key!r} has no name in the SD1 single-file layout.")
    side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    layers = config["layers_per_block"]
    per_block = [layers] * len(config["block_out_channels"]) if isinstance(layers, int) else list(layers)
    if side == "down_blocks":  # each block: its layers, then one entry that halves the size
        start = 1 + sum(per_block[:block]) + block
        if kind == "downsamplers":
            return f"input_blocks.{start + per_block[block]}.0.op.{rest.removeprefix('conv.')}"
        place = f"input_blocks.{start + index}"
    else:  # each block: one layer more; what doubles the size shares the last layer's entry
        counts = [count + 1 for count in reversed(per_block)]
        start = sum(counts[:block])
        if kind == "upsamplers":
            slot = 2 if "Attn" in config["up_block_types"][block] else 1
            return f"output_blocks.{start + counts[block] - 1}.{slot}.{rest}"
        place = f"output_blocks.{start + index}"
    return f"{place}.0.{_resnet(rest)}" if kind == "resnets" else f"{place}.1.{rest}"


def vae_key(key: str, config: Config) -> str:
    """Give LDM's name of a parameter of diffusers' `AutoencoderKL` with this config."""
    if match := _VAE_BLOCK.fullmatch(key):
        side, way, block, kind, index, rest = match[1], match[2], int(match[3]), match[4], match[5], match[6]
        if way == "up":
            block = len(config["block_out_channels"]) - 1 - block
        if kind == "resnets":
            return f"{side}.{way}.{block}.block.{index}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
        return f"{side}.{way}.{block}.{way}sample.{rest}"
    if match := _VAE_MIDDLE.fullmatch(key):
        side, kind, index, rest = match[1], match[2], match[3], match[4]
        if kind == "resnets":
            return f"{side}.mid.block_{int(index) + 1}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
        stem, end = rest.rsplit(".", 1)
        if index == "0" and stem in _VAE_ATTENTION:
            return f"{side}.mid.attn_1.{_VAE_ATTENTION[stem]}.{end}"
    elif re.fullmatch(
        r"(encoder|decoder)\.(conv_in|conv_out|conv_norm_out)\.\w+|(post_)?quant_conv\.\w+", key
    ):
        return key.replace("conv_norm_out", "norm_out")
    raise FormatError(f"the VAE's parameter {key!r} has no name in the SD1 single-file layout.")


def text_key(key: str) -> str:
    """Give the name after `text_model.`, which transformers 5 dropped and webui and LDM expect."""
    plain = key.removeprefix("text_model.").replace("token_embedding.table.", "token_embedding.")
    if not plain.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
        raise FormatError(f"the text encoder's parameter {key!r} has no name in the SD1 single-file layout.")
    return plain


def is_sd2_text(config: Config) -> bool:
    """Say whether a text encoder is Stable Diffusion 2's, which files keep in OpenCLIP's layout."""
    return config.get("hidden_size") == 1024


def sd2_text_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Stable Diffusion 2's text encoder to OpenCLIP's layout, q, k and v fused, under its prefix in files."""
    renamed: dict[str, Tensor] = {}
    fused: dict[str, list[Tensor]] = {}
    for key in sorted(
        state, key=lambda key: ("k_proj" in key) + 2 * ("v_proj" in key)
    ):  # q before k before v
        name = text_key(key)
        for ours, theirs in _SD2_TEXT:
            name = re.sub(ours, theirs, name)
        if "in_proj" in name:
            fused.setdefault(SD2_TEXT_PREFIX + name, []).append(state[key])
        else:
            renamed[SD2_TEXT_PREFIX + name] = state[key]
    return renamed | {name: torch.cat(parts) for name, parts in fused.items()}


def _resnet(rest: str) -> str:
    stem, end = rest.rsplit(".", 1)
    if stem not in _UNET_RESNET:
        raise FormatError(f"the U-Net's parameter '...{rest}' has no name in the SD1 single-file layout.")
    return f"{_UNET_RESNET[stem]}.{end}"
