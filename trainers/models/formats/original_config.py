"""Reads and writes the `.yaml` beside a single file, which tells the webui the prediction type of the U-Net.

The format is that of LDM's configs (CompVis, Stability's version 2) and of SDXL's generative-models. Models with
epsilon prediction need no `.yaml`, since the webui recognises their families by their keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamfleet.datasets.errors import FormatError
from dreamfleet.trainers.models.formats.ldm_names import Config, family_of
from dreamfleet.trainers.models.formats.pickle_writer import replacing

LARGEST_CONFIG = 50_000  # bytes; published ones have 3000
MOST_BRACKETS = 500  # PyYAML takes seconds for thousands of nested levels; published configs have 30
ZERO_SNR = "rescale_betas_zero_snr"  # a key beside `model:`; the webui ignores it and has a setting instead

_PARAMETERIZATIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_SCALINGS = {"epsilon": "EpsScaling", "v_prediction": "VScaling"}


def write_original_config(
    path: Path, configs: Mapping[str, Config], scheduler: Mapping[str, Any]
) -> Path | None:
    """Write the `.yaml` of a single file if its U-Net predicts velocity or its schedule has zero terminal SNR.

    Returns its path, or None if no `.yaml` is needed. `configs` are the complete configs of the parts.
    """
    import yaml

    prediction, zero_snr = scheduler["prediction_type"], bool(scheduler.get(ZERO_SNR))
    if prediction == "epsilon" and not zero_snr:
        return None
    family = family_of(configs)
    make = _engine if family == "sdxl" else _latent_diffusion
    tree: dict[str, Any] = {"model": make(configs, scheduler)}
    text = "# Beside the checkpoint of the same name: AUTOMATIC1111's webui reads here what the model predicts.\n"
    if zero_snr:
        text += "# There also set Settings > Sampler parameters > Noise schedule for sampling: Zero Terminal SNR.\n"
        tree[ZERO_SNR] = True
    target = path.with_suffix(".yaml")
    with replacing(target) as temporary:
        temporary.write_text(text + yaml.safe_dump(tree, sort_keys=False), "utf-8")
    return target


def schedule_beside(path: Path) -> Config:
    """Return the changes to the scheduler's config that the `.yaml` beside a single file declares; {} without one.

    Raises FormatError for a `.yaml` that cannot be read; the webui fails on such files too.
    """
    import yaml

    beside = path.with_suffix(".yaml")
    if not beside.is_file():
        return {}
    try:
        if beside.stat().st_size > LARGEST_CONFIG:
            raise FormatError(f"{beside}: too large for a model's config; move it away if it is not one.")
        text = beside.read_text("utf-8")
        if sum(text.count(each) for each in "[{") > MOST_BRACKETS or "- " * 8 in text:
            raise ValueError("it is nested too deeply")
        tree = yaml.safe_load(text)
    # Wrong tags, such as !!bool on another value, raise various exceptions in yaml's constructors.
    except (OSError, ValueError, LookupError, AttributeError, RecursionError, yaml.YAMLError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(
            f"{beside}: the config beside the model cannot be read ({why}); move it away if it is not one."
        ) from error
    params = _at(tree, "model", "params")
    changes: Config = {}
    names = {short: name for name, short in _PARAMETERIZATIONS.items()}
    if isinstance(short := _at(params, "parameterization"), str) and short in names:
        changes["prediction_type"] = names[short]
    target = _at(params, "denoiser_config", "params", "scaling_config", "target")
    for name, scaling in _SCALINGS.items():
        if isinstance(target, str) and target.rpartition(".")[2] == scaling:
            changes["prediction_type"] = name
    for theirs, ours in (("linear_start", "beta_start"), ("linear_end", "beta_end")):
        if type(value := _at(params, theirs)) is float and 0 < value < 1:
            changes[ours] = value
    if _at(tree, ZERO_SNR) is True:
        changes[ZERO_SNR] = True
    return changes


def _at(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, str | int | float | dict) else None


def _latent_diffusion(configs: Mapping[str, Config], scheduler: Mapping[str, Any]) -> Config:
    if family_of(configs) == "sd2":
        text: Config = {
            "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
            "params": {"freeze": True, "layer": "penultimate"},
        }
    else:
        text = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    return {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "parameterization": _PARAMETERIZATIONS[scheduler["prediction_type"]],
            "linear_start": scheduler["beta_start"],
            "linear_end": scheduler["beta_end"],
            "timesteps": scheduler["num_train_timesteps"],
            "num_timesteps_cond": 1,
            "log_every_t": 200,
            "first_stage_key": "jpg",
            "cond_stage_key": "txt",
            "cond_stage_trainable": False,
            "conditioning_key": "crossattn",
            "image_size": configs["unet"]["sample_size"],
            "channels": configs["unet"]["in_channels"],
            "scale_factor": configs["vae"]["scaling_factor"],
            "use_ema": False,
            "unet_config": _unet("ldm", configs["unet"]),
            "first_stage_config": _vae("ldm.models.autoencoder.AutoencoderKL", configs["vae"]),
            "cond_stage_config": text,
        },
    }


def _engine(configs: Mapping[str, Config], scheduler: Mapping[str, Any]) -> Config:
    inside = "sgm.modules.diffusionmodules"
    scaling = _SCALINGS.get(scheduler["prediction_type"], "EpsScaling")
    return {
        "target": "sgm.models.diffusion.DiffusionEngine",
        "params": {
            "scale_factor": configs["vae"]["scaling_factor"],
            "disable_first_stage_autocast": True,
            "denoiser_config": {
                "target": f"{inside}.denoiser.DiscreteDenoiser",
                "params": {
                    "num_idx": scheduler["num_train_timesteps"],
                    "weighting_config": {"target": f"{inside}.denoiser_weighting.EpsWeighting"},
                    "scaling_config": {"target": f"{inside}.denoiser_scaling.{scaling}"},
                    "discretization_config": {"target": f"{inside}.discretizer.LegacyDDPMDiscretization"},
                },
            },
            "network_config": _unet("sgm", configs["unet"]),
            "conditioner_config": {
                "target": "sgm.modules.GeneralConditioner",
                "params": {"emb_models": _conditioners(configs["unet"])},
            },
            "first_stage_config": _vae(
                "sgm.models.autoencoder.AutoencoderKLInferenceWrapper", configs["vae"]
            ),
        },
    }


def _conditioners(unet: Config) -> list[Config]:
    encoders, number = "sgm.modules.encoders.modules", {"outdim": unet["addition_time_embed_dim"]}
    texts: list[Config] = [
        {
            "target": f"{encoders}.FrozenCLIPEmbedder",
            "params": {"layer": "hidden", "layer_idx": 11},
        },
        {
            "target": f"{encoders}.FrozenOpenCLIPEmbedder2",
            "params": {
                "arch": "ViT-bigG-14",
                "version": "laion2b_s39b_b160k",
                "freeze": True,
                "layer": "penultimate",
                "always_return_pooled": True,
                "legacy": False,
            },
        },
    ]
    numbers = [
        {"input_key": key, "target": f"{encoders}.ConcatTimestepEmbedderND", "params": dict(number)}
        for key in ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    ]
    return [
        {"is_trainable": False, **entry}
        for entry in (*({"input_key": "txt", **text} for text in texts), *numbers)
    ]


def _unet(package: str, config: Config) -> Config:
    channels, heads = config["block_out_channels"], config["attention_head_dim"]
    attended = [2**level for level, kind in enumerate(config["down_block_types"]) if "CrossAttn" in kind]
    params: Config = {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [width // channels[0] for width in channels],
        "num_res_blocks": config["layers_per_block"],
        "attention_resolutions": attended[::-1],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": bool(config.get("use_linear_projection")),
        "transformer_depth": config.get("transformer_layers_per_block", 1),
        "context_dim": config["cross_attention_dim"],
        "use_checkpoint": False,
        "legacy": False,
    }
    # diffusers' attention_head_dim is the number of heads; LDM's later configs contain the width of a head.
    params |= (
        {"num_heads": heads} if isinstance(heads, int) else {"num_head_channels": channels[0] // heads[0]}
    )
    if package == "sgm":
        params |= {
            "adm_in_channels": config["projection_class_embeddings_input_dim"],
            "num_classes": "sequential",
            "spatial_transformer_attn_type": "softmax-xformers",
        }
    else:
        params["image_size"] = 32  # not used by LDM's U-Net
    return {"target": f"{package}.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


def _vae(target: str, config: Config) -> Config:
    channels = config["block_out_channels"]
    return {
        "target": target,
        "params": {
            "embed_dim": config["latent_channels"],
            "monitor": "val/rec_loss",
            "ddconfig": {
                "double_z": True,
                "z_channels": config["latent_channels"],
                "resolution": 256,
                "in_channels": config["in_channels"],
                "out_ch": config["out_channels"],
                "ch": channels[0],
                "ch_mult": [width // channels[0] for width in channels],
                "num_res_blocks": config["layers_per_block"],
                "attn_resolutions": [],
                "dropout": 0.0,
            },
            "lossconfig": {"target": "torch.nn.Identity"},
        },
    }
