"""Stable Diffusion in one file: diffusers' parts under the key names of LDM and webui, and back.

The SD1 layout: `model.diffusion_model.` (U-Net), `first_stage_model.` (VAE), `cond_stage_model.transformer.text_model.`
(text encoder). Names follow from the numbers of blocks and layers in the configs, so that unusual shapes, such as the
pocket model's, convert too; their configs and small tokenizers travel in the file.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dreamfleet.datasets.errors import FormatError, ModelError
from dreamfleet.trainers.sd.formats.ldm_names import (
    PARTS,
    PREFIXES,
    SD1_CONFIGS,
    Config,
    file_key,
    is_sd2_text,
    sd2_text_state,
)
from dreamfleet.trainers.sd.formats.model_header import config_of, configs_in, model_header, tokenizer_in
from dreamfleet.trainers.sd.formats.pickles import load_pickle, save_pickle
from dreamfleet.trainers.sd.formats.tensor_files import read_safetensors, to_dtype, write_safetensors

if TYPE_CHECKING:
    from dreamfleet.trainers.sd.model import StableDiffusion


@dataclass(frozen=True)
class SingleFileParts:
    """What a single file holds: state dicts under diffusers' names, the configs they fit, the header's text entries."""

    states: dict[str, dict[str, Tensor]]
    configs: dict[str, Config]
    metadata: dict[str, str]


def to_single_file(
    states: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, Config]
) -> dict[str, Tensor]:
    """Rename the state dicts of `PARTS` to one dict in the SD1 layout; tensors are shared, not copied.

    Stable Diffusion 2's text encoder is written in OpenCLIP's layout, as webui reads it. Raises FormatError for a
    parameter that the layout has no name for.
    """
    file: dict[str, Tensor] = {}
    for part in PARTS:
        state = states.get(part, {})
        if part == "text_encoder" and is_sd2_text(configs.get(part, {})):
            file |= sd2_text_state(state)
            continue
        for key, tensor in state.items():
            file[file_key(part, key, configs[part])] = _to_file_shape(part, key, tensor)
    return file


def from_single_file(
    state: Mapping[str, Tensor], configs: Mapping[str, Config], *, needs: Collection[str] = PARTS
) -> dict[str, dict[str, Tensor]]:
    """Rename a single file's dict to one state dict a part, with the shapes that `configs` ask for.

    Raises FormatError naming the part that is missing or does not fit.
    """
    if "text_encoder" in needs and is_sd2_text(configs["text_encoder"]):
        raise FormatError("Stable Diffusion 2 is not read from a single file yet; use its diffusers folder.")
    states = {}
    for part in PARTS:
        if part in needs:
            wanted = empty_part(part, configs[part]).state_dict()
            states[part] = {
                key: _take(state, part, key, list(tensor.shape), configs[part])
                for key, tensor in wanted.items()
            }
    return states


def save_single_file(
    model: StableDiffusion,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write the whole model as `.safetensors` or `.ckpt` in webui's key layout, in `dtype` (each part's own when None).

    A `.safetensors` is written tensor by tensor, so no second copy of the model is held. `metadata` joins the header.
    """
    path = Path(path)
    parts = model.modules()
    if missing := [part for part in PARTS if part not in parts]:
        raise ModelError(f"{path}: a single file needs the whole model; {', '.join(missing)} not loaded.")
    configs = {part: config_of(module) for part, module in parts.items()}
    state = to_single_file({part: module.state_dict() for part, module in parts.items()}, configs)
    header = {**model_header(model, configs, title=path.stem), **(metadata or {})}
    if path.suffix == ".ckpt":
        converted = {key: to_dtype(tensor, dtype) for key, tensor in state.items()}
        return save_pickle({"state_dict": converted, "dreamfleet": header}, path)
    if path.suffix != ".safetensors":
        raise FormatError(f"{path}: a single file ends in .safetensors or .ckpt.")
    write_safetensors(state, path, dtype=dtype, header=header)
    return path


def load_single_file_parts(
    path: str | os.PathLike[str],
    *,
    configs: Mapping[str, Config] | None = None,
    needs: Collection[str] = PARTS,
) -> SingleFileParts:
    """Read a `.safetensors` or `.ckpt` of the SD1 layout; `configs` overrule the ones in the file or SD1's own.

    Raises FormatError for another kind of model, and for parts that are missing or do not fit their config.
    """
    path = Path(path)
    state, metadata = _read(path)
    found = {**configs_in(metadata, path), **(configs or {})}
    if not found:
        require_sd1(state, path)
    every = {**SD1_CONFIGS, **found}
    try:
        states = from_single_file(state, every, needs=needs)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    return SingleFileParts(states, every, metadata)


def load_single_file(
    path: str | os.PathLike[str], *, name: str | None = None, needs: Collection[str] = PARTS
) -> StableDiffusion:
    """Load a model from a single file, in float32 on the CPU; its `content_hash` is left empty.

    Raises FormatError as `load_single_file_parts`, ModelError when SD1's tokenizer is not on this machine.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    from dreamfleet.trainers.sd.model import StableDiffusion

    parts = load_single_file_parts(path, needs=needs)
    modules: dict[str, Any] = dict.fromkeys(PARTS)
    for part, state in parts.states.items():
        module = empty_part(part, parts.configs[part])
        while state:  # one by one, so that a half-precision file is never held twice in full precision
            key, tensor = state.popitem()
            _assign(module, key, tensor.float())
        modules[part] = module.eval()
    return StableDiffusion(
        tokenizer=tokenizer_in(parts.metadata, Path(path)),
        scheduler=DDPMScheduler.from_config(parts.configs["scheduler"]),
        folder=name or str(path),
        content_hash="",
        **modules,
    )


def _is_vae_attention(part: str, key: str) -> bool:
    return part == "vae" and ".attentions." in key and key.endswith("weight") and "group_norm" not in key


def _to_file_shape(part: str, key: str, tensor: Tensor) -> Tensor:
    # LDM's VAE attention is made of 1x1 convolutions, diffusers' of linear layers.
    return tensor[:, :, None, None] if _is_vae_attention(part, key) and tensor.ndim == 2 else tensor


def _take(state: Mapping[str, Tensor], part: str, key: str, shape: list[int], config: Config) -> Tensor:
    name = file_key(part, key, config)
    # Programs that used transformers 5 without thinking wrote text encoders without `text_model.`.
    other = name.replace(".text_model.", ".") if part == "text_encoder" else name
    tensor = state.get(name, state.get(other))
    if tensor is None:
        whole = any(known.startswith(PREFIXES[part].removesuffix("text_model.")) for known in state)
        raise FormatError(
            f"its {part} lacks {name}; the file is not of the SD1 layout or was cut."
            if whole
            else f"it holds no {part} (no {PREFIXES[part]}*); use a file of the whole model."
        )
    if _is_vae_attention(part, key) and tensor.ndim == 4:
        tensor = tensor[:, :, 0, 0]
    if list(tensor.shape) != shape:
        raise FormatError(
            f"{name} has shape {list(tensor.shape)}, but the model it says to be has {shape}; "
            "this family of models is not read from single files, use its diffusers folder."
        )
    return tensor


def empty_part(part: str, config: Config) -> nn.Module:
    """Build a part without memory for its parameters."""
    try:
        with torch.device("meta"):
            if part == "unet":
                from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

                module: Any = UNet2DConditionModel.from_config(config)
            elif part == "vae":
                from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

                module = AutoencoderKL.from_config(config)
            else:
                from transformers import CLIPTextConfig, CLIPTextModel

                module = CLIPTextModel(CLIPTextConfig(**config))
    except Exception as error:  # a config from a file can be wrong in any way
        raise FormatError(f"its {part} config makes no model ({error}).") from error
    for owner in module.modules():
        if "position_ids" in owner._buffers:
            owner.position_ids = torch.arange(owner.position_ids.shape[-1])[None]
    return module


def _assign(module: nn.Module, key: str, tensor: Tensor) -> None:
    owner_name, _, leaf = key.rpartition(".")
    setattr(module.get_submodule(owner_name), leaf, nn.Parameter(tensor, requires_grad=False))


def _read(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    data = load_pickle(path)
    state = data.get("state_dict", data) if isinstance(data, dict) else None
    if not isinstance(state, dict):
        raise FormatError(f"{path}: holds no model; a .ckpt is a dict of tensors.")
    header = data.get("dreamfleet")
    header = header if isinstance(header, dict) else {}
    return (
        {key: value for key, value in state.items() if isinstance(value, Tensor)},
        {str(key): value for key, value in header.items() if isinstance(value, str)},
    )


def require_sd1(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse the other families by the keys that webui tells them apart by (reference, section 1.5)."""
    family = ""
    if "conditioner.embedders.1.model.ln_final.weight" in state:
        family = "SDXL"
    elif "cond_stage_model.model.ln_final.weight" in state:
        family = "Stable Diffusion 2"
    first = state.get("model.diffusion_model.input_blocks.0.0.weight")
    if not family and first is not None and first.ndim == 4 and first.shape[1] in (8, 9):
        family = "an inpainting or editing model"
    if family:
        raise FormatError(
            f"{path}: {family}, which is not read from a single file yet; use its diffusers folder."
        )
