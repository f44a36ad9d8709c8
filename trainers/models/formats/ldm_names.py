"""Defines Stable Diffusion's families, and maps U-Net and VAE parameters to names in single files, for any depth."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from dreamfleet.datasets.errors import FormatError
from dreamfleet.trainers.models.formats.text_names import Place, clip_place, openclip_place

Config = dict[str, Any]
Family = Literal["sd1", "sd2", "sdxl"]

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
NEEDS = PARTS[:3]  # the parts that can be requested; "text_encoder" includes SDXL's second one
_UNET_AND_VAE = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
PREFIXES: dict[Family, dict[str, str]] = {
    "sd1": {**_UNET_AND_VAE, "text_encoder": "cond_stage_model.transformer.text_model."},
    "sd2": {**_UNET_AND_VAE, "text_encoder": "cond_stage_model.model."},
    "sdxl": {
        **_UNET_AND_VAE,
        "text_encoder": "conditioner.embedders.0.transformer.text_model.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}

_OPENCLIP = (("sd2", "text_encoder"), ("sdxl", "text_encoder_2"))  # text encoders stored in OpenCLIP's layout

# The start, end and padding ids in the published configs of these encoders. They are wrong, but not used: the encoder
# takes the position of the largest id of a text as its end.
_OLD_TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}

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
        "set_alpha_to_one": False,  # DDIM's last step ends at the noise level of timestep 0, as in published folders
        "steps_offset": 1,
        "prediction_type": "epsilon",
    },
}
SD2_CONFIGS: dict[str, Config] = {  # 2.1 at 768 pixels; `SD2_BASE_CONFIGS` is the one at 512
    "unet": {
        **SD1_CONFIGS["unet"],
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "vae": {**SD1_CONFIGS["vae"], "sample_size": 768},
    "text_encoder": {
        **SD1_CONFIGS["text_encoder"],
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,  # of 24 in OpenCLIP, since the U-Net uses the output of the last but one
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 512,
        **_OLD_TOKEN_IDS,
    },
    "scheduler": {**SD1_CONFIGS["scheduler"], "prediction_type": "v_prediction"},
}
SD2_BASE_CONFIGS: dict[str, Config] = {
    **SD2_CONFIGS,
    "unet": {**SD2_CONFIGS["unet"], "sample_size": 64, "upcast_attention": False},
    "vae": SD1_CONFIGS["vae"],
    "scheduler": SD1_CONFIGS["scheduler"],
}
SDXL_CONFIGS: dict[str, Config] = {
    "unet": {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": {**SD1_CONFIGS["vae"], "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "text_encoder": {**SD1_CONFIGS["text_encoder"], **_OLD_TOKEN_IDS},
    "text_encoder_2": {
        **SD1_CONFIGS["text_encoder"],
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
        **_OLD_TOKEN_IDS,
    },
    "scheduler": {**SD1_CONFIGS["scheduler"], "timestep_spacing": "leading"},
}
FAMILY_CONFIGS: dict[Family, dict[str, Config]] = {
    "sd1": SD1_CONFIGS,
    "sd2": SD2_CONFIGS,
    "sdxl": SDXL_CONFIGS,
}

OTHER_CHANNELS = {  # input channels of a U-Net (latents and others) -> the kind of model
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an editing model (InstructPix2Pix)",
    9: "an inpainting model",
}
_UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
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
_UNET_BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)")
_UNET_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_VAE_BLOCK = re.compile(r"(\w+)\.(down|up)_blocks\.(\d+)\.(resnets|\w+samplers)\.(\d+)\.(.+)")
_VAE_MIDDLE = re.compile(r"(\w+)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def family_of(configs: Mapping[str, Config]) -> Family:
    """Return a model's family, which determines its single-file layout, from the configs of its parts."""
    if "text_encoder_2" in configs or configs.get("unet", {}).get("addition_embed_type") == "text_time":
        return "sdxl"
    # OpenCLIP's text encoders use the exact GELU, OpenAI's (SD1) the quick approximation.
    text = configs.get("text_encoder", {})
    return "sd2" if text.get("hidden_size") == 1024 or text.get("hidden_act") == "gelu" else "sd1"


def parts_of(family: Family) -> tuple[str, ...]:
    """Return the parts of a complete model of a family."""
    return tuple(part for part in PARTS if part in PREFIXES[family])


def file_place(part: str, key: str, config: Config, family: Family) -> Place:
    """Return the place of a parameter of one of `PARTS` in a single file of this family.

    Raises FormatError for a parameter that has no name in the layout.
    """
    if part == "unet":
        place = Place(unet_key(key, config))
    elif part == "vae":
        place = Place(vae_key(key, config))
    else:
        place = openclip_place(key) if (family, part) in _OPENCLIP else clip_place(key)
    return place.under(PREFIXES[family][part])


def unet_key(key: str, config: Config) -> str:
    """Return LDM's name of a parameter of diffusers' `UNet2DConditionModel` with this config."""
    stem, end = key.rsplit(".", 1)
    if stem in _UNET_TOP:
        return f"{_UNET_TOP[stem]}.{end}"
    if match := _UNET_MIDDLE.fullmatch(key):
        kind, index, rest = match[1], int(match[2]), match[3]
        return f"middle_block.{2 * index + (kind == 'attentions')}.{_resnet(rest) if kind == 'resnets' else rest}"
    if not (match := _UNET_BLOCK.fullmatch(key)):
        raise FormatError(f"the U-Net's parameter {key!r} has no name in single files.")
    side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    layers = config["layers_per_block"]
    per_block = [layers] * len(config["block_out_channels"]) if isinstance(layers, int) else list(layers)
    if side == "down_blocks":  # each block: its layers, then the downsampling entry
        start = 1 + sum(per_block[:block]) + block
        if kind == "downsamplers":
            return f"input_blocks.{start + per_block[block]}.0.op.{rest.removeprefix('conv.')}"
        place = f"input_blocks.{start + index}"
    else:  # each block: one more layer; upsampling shares the last layer's entry
        counts = [count + 1 for count in reversed(per_block)]
        start = sum(counts[:block])
        if kind == "upsamplers":
            slot = 2 if "Attn" in config["up_block_types"][block] else 1
            return f"output_blocks.{start + counts[block] - 1}.{slot}.{rest}"
        place = f"output_blocks.{start + index}"
    return f"{place}.0.{_resnet(rest)}" if kind == "resnets" else f"{place}.1.{rest}"


def vae_key(key: str, config: Config) -> str:
    """Return LDM's name of a parameter of diffusers' `AutoencoderKL` with this config."""
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
    raise FormatError(f"the VAE's parameter {key!r} has no name in single files.")


def _resnet(rest: str) -> str:
    stem, end = rest.rsplit(".", 1)
    if stem not in _UNET_RESNET:
        raise FormatError(f"the U-Net's parameter '...{rest}' has no name in single files.")
    return f"{_UNET_RESNET[stem]}.{end}"
