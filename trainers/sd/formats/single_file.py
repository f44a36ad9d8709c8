"""Stable Diffusion in one file: diffusers' parts under the key names of LDM and webui, and back.

The SD1 layout: `model.diffusion_model.` (U-Net), `first_stage_model.` (VAE), `cond_stage_model.transformer.text_model.`
(text encoder). Names follow from the numbers of blocks and layers in the configs, so that unusual shapes, such as the
pocket model's, convert too; their configs and small tokenizers travel in the file.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dreamfleet.datasets.disk import as_storage_error
from dreamfleet.datasets.errors import FormatError, ModelError
from dreamfleet.trainers.sd.formats.ldm_names import PARTS, PREFIXES, SD1_CONFIGS, Config, file_key
from dreamfleet.trainers.sd.formats.pickles import load_pickle, replacing, save_pickle

if TYPE_CHECKING:
    from dreamfleet.trainers.sd.model import StableDiffusion

SD1_TOKENIZER = "openai/clip-vit-large-patch14"
LARGEST_TOKENIZER = 20_000  # tokens; a larger one is SD1's own, which every program has


@dataclass(frozen=True)
class SingleFileParts:
    """What a single file holds: state dicts under diffusers' names, the configs they fit, the header's text entries."""

    states: dict[str, dict[str, Tensor]]
    configs: dict[str, Config]
    metadata: dict[str, str]
    tokenizer: dict[str, str] | None


def to_single_file(
    states: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, Config]
) -> dict[str, Tensor]:
    """Rename the state dicts of `PARTS` to one dict in the SD1 layout; tensors are shared, not copied.

    Raises FormatError for a parameter that SD1 has no name for.
    """
    return {
        file_key(part, key, configs[part]): _to_file_shape(part, key, tensor)
        for part in PARTS
        if part in states
        for key, tensor in states[part].items()
    }


def from_single_file(
    state: Mapping[str, Tensor], configs: Mapping[str, Config], *, needs: Collection[str] = PARTS
) -> dict[str, dict[str, Tensor]]:
    """Rename a single file's dict to one state dict a part, with the shapes that `configs` ask for.

    Raises FormatError naming the part that is missing or does not fit.
    """
    states = {}
    for part in PARTS:
        if part in needs:
            wanted = _empty_part(part, configs[part]).state_dict()
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
    configs = {part: _config_of(module) for part, module in parts.items()}
    state = to_single_file({part: module.state_dict() for part, module in parts.items()}, configs)
    header = {**_header(model, configs, title=path.stem), **(metadata or {})}
    if path.suffix == ".ckpt":
        converted = {key: _to_dtype(tensor, dtype) for key, tensor in state.items()}
        return save_pickle({"state_dict": converted, "dreamfleet": header}, path)
    if path.suffix != ".safetensors":
        raise FormatError(f"{path}: a single file ends in .safetensors or .ckpt.")
    _stream_safetensors(state, path, dtype=dtype, header={"format": "pt", **header})
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
    found = {**_configs_in(metadata, path), **(configs or {})}
    if not found:
        _require_sd1(state, path)
    every = {**SD1_CONFIGS, **found}
    try:
        states = from_single_file(state, every, needs=needs)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    text = metadata.get("dreamfleet.tokenizer")
    return SingleFileParts(states, every, metadata, _json(text, path) if text else None)


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
        module = _empty_part(part, parts.configs[part])
        while state:  # one by one, so that a half-precision file is never held twice in full precision
            key, tensor = state.popitem()
            _assign(module, key, tensor.float())
        modules[part] = module.eval()
    return StableDiffusion(
        tokenizer=_tokenizer(parts, Path(path)),
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


def _empty_part(part: str, config: Config) -> nn.Module:
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


def _config_of(module: Any) -> Config:
    config = module.config
    full = config.to_diff_dict() if hasattr(config, "to_diff_dict") else dict(config)
    full = {
        key: value for key, value in full.items() if not key.startswith("_") and key != "transformers_version"
    }
    return json.loads(json.dumps(full, default=str))


def _header(model: StableDiffusion, configs: dict[str, Config], *, title: str) -> dict[str, str]:
    scheduler = {key: value for key, value in dict(model.scheduler.config).items() if not key.startswith("_")}
    side = model.resolution
    header = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v"
        if model.prediction_type == "v_prediction"
        else model.prediction_type,
    }
    for part, config in {**configs, "scheduler": scheduler}.items():
        header[f"dreamfleet.{part}_config"] = json.dumps(config, sort_keys=True)
    if len(model.tokenizer) <= LARGEST_TOKENIZER:
        with tempfile.TemporaryDirectory(prefix="dreamfleet-") as folder:
            model.tokenizer.save_pretrained(folder)
            files = {file.name: file.read_text("utf-8") for file in sorted(Path(folder).glob("*"))}
        header["dreamfleet.tokenizer"] = json.dumps(files)
    return header


def _to_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to(dtype=dtype if tensor.is_floating_point() else None, device="cpu").contiguous()


_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


def _stream_safetensors(
    state: Mapping[str, Tensor], path: Path, *, dtype: torch.dtype | None, header: dict[str, str]
) -> None:
    """Write a safetensors file holding one converted tensor at a time (format: huggingface/safetensors README)."""
    entries: dict[str, Any] = {"__metadata__": header}
    end = 0
    for key, tensor in state.items():
        kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        start, end = end, end + tensor.numel() * kind.itemsize
        entries[key] = {
            "dtype": _DTYPE_NAMES[kind],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in state.values():
            content: Any = _to_dtype(tensor, dtype).reshape(-1).view(torch.uint8).numpy()
            file.write(memoryview(content))


def _read(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        except OSError as error:
            raise as_storage_error("read", str(path), error) from error
        except SafetensorError as error:
            raise FormatError(
                f"{path}: not a whole safetensors file ({error}). Copy or export it again."
            ) from error
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


def _configs_in(metadata: Mapping[str, str], path: Path) -> dict[str, Config]:
    names = {part: f"dreamfleet.{part}_config" for part in (*PARTS, "scheduler")}
    return {part: _json(metadata[name], path) for part, name in names.items() if name in metadata}


def _json(text: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: its header is damaged ({error}).") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: its header is damaged (expected an object).")
    return value


def _require_sd1(state: Mapping[str, Tensor], path: Path) -> None:
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


def _tokenizer(parts: SingleFileParts, path: Path) -> Any:
    from transformers import CLIPTokenizer

    if parts.tokenizer:
        with tempfile.TemporaryDirectory(prefix="dreamfleet-") as folder:
            for name, text in parts.tokenizer.items():
                (Path(folder) / Path(name).name).write_text(str(text), "utf-8")
            return CLIPTokenizer.from_pretrained(folder)
    try:
        return CLIPTokenizer.from_pretrained(SD1_TOKENIZER)
    except Exception as error:  # network, cache and version errors differ from version to version
        raise ModelError(
            f"{path}: a single file holds no tokenizer, and SD1's ({SD1_TOKENIZER}) is neither on this machine nor to "
            "be had from the hub. Download it once where there is a network, or use the model's diffusers folder."
        ) from error
