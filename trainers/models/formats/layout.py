"""Converts Stable Diffusion's parameters between diffusers' state dicts per part and the one dict of a single file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreamfleet.datasets.errors import FormatError
from dreamfleet.trainers.models.formats.ldm_names import (
    NEEDS,
    OTHER_CHANNELS,
    PREFIXES,
    Config,
    Family,
    family_of,
    file_place,
    parts_of,
)
from dreamfleet.trainers.models.formats.text_names import Place, clip_place, openclip_place

_MOST_LAYERS = 200
_LARGEST_SIZE = 2**20
_OTHER_KEYS = {
    "conditioner.embedders.0.model.ln_final.weight": "SDXL's refiner",
    "depth_model.model.pretrained.act_postprocess3.0.project.0.bias": "a depth model",
    "embedder.model.ln_final.weight": "an unCLIP model",
    "edm_mean": "a model with EDM's noise (Playground 2.5)",
    "cond_stage_model.roberta.embeddings.word_embeddings.weight": "AltDiffusion",
}


class FileState(Mapping[str, Tensor]):
    """The tensors of a single file by name. Joined tensors (queries, keys, values) are concatenated on access."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[int, Tensor]] = {}

    def put(self, place: Place, tensor: Tensor) -> None:
        """Add a parameter, or one third of a joined tensor, without copying it."""
        self._kept.setdefault(place.name, {})[place.third or 0] = tensor.T if place.transposed else tensor

    def __getitem__(self, name: str) -> Tensor:
        kept = self._kept[name]
        return kept[0] if len(kept) == 1 else torch.cat([kept[third] for third in sorted(kept)])

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


def to_single_file(states: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, Config]) -> FileState:
    """Return one state dict in the family's layout from the state dicts of `PARTS`; tensors are shared, not copied.

    SD2's text encoder gets OpenCLIP's `text_projection`, although no U-Net uses it, because diffusers up to 0.32
    otherwise assumes that queries, keys and values have a width of 512. Raises FormatError for a parameter that has no
    name in the layout.
    """
    family, file = family_of(configs), FileState()
    for part in parts_of(family):
        for key, tensor in states.get(part, {}).items():
            place = file_place(part, key, configs[part], family)
            file.put(place, _to_file_shape(part, key, tensor))
    if family == "sd2" and "text_encoder" in states:
        place = openclip_place("text_projection.weight").under(PREFIXES[family]["text_encoder"])
        table = next(t for key, t in states["text_encoder"].items() if "token_embedding" in key)
        file.put(place, torch.eye(table.shape[1], dtype=table.dtype, device=table.device))
    return file


def from_single_file(
    state: Mapping[str, Tensor], configs: Mapping[str, Config], *, needs: Collection[str] = NEEDS
) -> dict[str, dict[str, Tensor]]:
    """Return one state dict per part from a single file's dict, with the shapes defined by `configs`.

    "text_encoder" in `needs` stands for both text encoders of SDXL. Raises FormatError naming the part that is missing
    or does not fit its config.
    """
    family = family_of(configs)
    states = {}
    for part in parts_of(family):
        if part.removesuffix("_2") in needs:
            wanted = empty_part(part, configs[part]).state_dict()
            states[part] = {
                key: _take(state, part, key, list(tensor.shape), configs[part], family)
                for key, tensor in wanted.items()
            }
    return states


def family_in(state: Mapping[str, Tensor], path: Path) -> Family:
    """Return a file's family, recognised as in the webui by its keys. Raises FormatError for an unsupported model.

    Source of the keys: webui, modules/sd_models_config.py.
    """
    first = state.get("model.diffusion_model.input_blocks.0.0.weight")
    channels = first.shape[1] if first is not None and first.ndim == 4 else 4
    other = ""
    if channels in OTHER_CHANNELS:
        other = OTHER_CHANNELS[channels]
    for key, kind in _OTHER_KEYS.items():
        if key in state:
            other = kind
    if other:
        raise FormatError(f"{path}: {other}, which is not supported; use a text-to-image model.")
    if "conditioner.embedders.1.model.ln_final.weight" in state:
        return "sdxl"
    context = state.get("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    wide = context is not None and context.shape[-1] == 1024
    return "sd2" if wide or "cond_stage_model.model.ln_final.weight" in state else "sd1"


def empty_part(part: str, config: Config) -> nn.Module:
    """Build a part on the meta device. Raises FormatError for an invalid config."""
    require_sane(config, part)
    try:
        with torch.device("meta"):
            if part == "unet":
                from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

                module: Any = UNet2DConditionModel.from_config(config)
            elif part == "vae":
                from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

                module = AutoencoderKL.from_config(config)
            else:
                from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

                kind = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
                module = kind(CLIPTextConfig(**config))
    except Exception as error:  # a config from a file can raise any exception
        raise FormatError(f"its {part} config makes no model ({error}).") from error
    for owner in module.modules():
        if "position_ids" in owner._buffers:
            owner.position_ids = torch.arange(owner.position_ids.shape[-1])[None]
    return module


def _is_vae_attention(part: str, key: str) -> bool:
    return part == "vae" and ".attentions." in key and key.endswith("weight") and "group_norm" not in key


def _to_file_shape(part: str, key: str, tensor: Tensor) -> Tensor:
    # LDM's VAE attention has 1x1 convolutions, diffusers' has linear layers.
    return tensor[:, :, None, None] if _is_vae_attention(part, key) and tensor.ndim == 2 else tensor


def _take(
    state: Mapping[str, Tensor], part: str, key: str, shape: list[int], config: Config, family: Family
) -> Tensor:
    places = [file_place(part, key, config, family)]
    if part == "text_encoder":
        # Also accept the names of converters that treat all text encoders as SD1's or omit transformers' `text_model.`.
        prefix = PREFIXES["sdxl" if family == "sdxl" else "sd1"][part]
        places += [clip_place(key).under(prefix.removesuffix(end)) for end in ("", "text_model.")]
    place = next((place for place in places if place.name in state), None)
    if place is None:
        prefix = PREFIXES[family][part].removesuffix("text_model.")
        raise FormatError(
            f"its {part} lacks {places[0].name}; the file is truncated, or holds another kind of model."
            if any(name.startswith(prefix) for name in state)
            else f"it holds no {part} (no {PREFIXES[family][part]}*); use a file of the whole model."
        )
    tensor = _own_part(state[place.name], place, shape)
    if list(tensor.shape) != shape or not tensor.is_floating_point():
        raise FormatError(
            f"{place.name} has shape {list(state[place.name].shape)}, type {tensor.dtype}, which does not fit {shape} "
            "of the model it says to be; use its diffusers folder."
        )
    return tensor


def _own_part(tensor: Tensor, place: Place, shape: list[int]) -> Tensor:
    """Return a parameter from the tensor that contains it: a third, a transpose, or a reshape of it to `shape`."""
    if place.third is not None and tensor.ndim and len(tensor) == 3 * shape[0]:
        return tensor.chunk(3)[place.third].clone()  # safetensors does not save tensors that share memory
    if place.transposed and tensor.ndim == 2:
        return tensor.T.contiguous()
    # A linear layer may be stored as a 1x1 convolution, and vice versa.
    if tensor.ndim == 4 and len(shape) == 2 and list(tensor.shape[2:]) == [1, 1]:
        return tensor[:, :, 0, 0]
    return tensor[:, :, None, None] if tensor.ndim == 2 and shape[2:] == [1, 1] else tensor


def require_sane(config: Config, part: str) -> None:
    """Raise FormatError for a config with excessive sizes or numbers of layers, which would take too long to build."""

    def numbers(value: Any, depth: int) -> list[int | float]:
        if depth > 3 or isinstance(value, dict):
            return []
        if isinstance(value, list | tuple):
            return [number for item in value[:64] for number in numbers(item, depth + 1)]
        return [value] if isinstance(value, int | float) else []

    for key, value in config.items():
        largest = _MOST_LAYERS if "layers" in key else _LARGEST_SIZE
        too_long = isinstance(value, list | tuple) and len(value) > 64
        if too_long or any(not abs(number) <= largest for number in numbers(value, 0)):
            raise FormatError(f"its {part} config makes no model ({key} is beyond any model's).")
