"""Reads and writes Stable Diffusion as a single file with the keys of LDM and the webui, from and to diffusers' parts.

Each family has its own layout. All have the prefixes `model.diffusion_model.` (U-Net) and `first_stage_model.` (VAE);
the text encoders have transformers' names (SD1, SDXL's first) or OpenCLIP's (SD2, SDXL's second). Names are derived
from the numbers of blocks and layers in the configs, so models of unusual shape, such as the pocket model, can be
converted too; their configs and small tokenizers are stored in the file.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dreamfleet.datasets.errors import FormatError
from dreamfleet.trainers.models.formats.layout import family_in, from_single_file, to_single_file
from dreamfleet.trainers.models.formats.ldm_names import (
    FAMILY_CONFIGS,
    NEEDS,
    SD2_BASE_CONFIGS,
    Config,
    family_of,
)
from dreamfleet.trainers.models.formats.model_header import configs_in
from dreamfleet.trainers.models.formats.original_config import write_original_config
from dreamfleet.trainers.models.formats.pickle_writer import (
    is_dense,
    load_pickle,
    require_backed,
    save_pickle,
)
from dreamfleet.trainers.models.formats.prediction import declared_schedule, prediction_marks
from dreamfleet.trainers.models.formats.tensor_files import read_safetensors, to_dtype, write_safetensors
from dreamfleet.trainers.models.formats.text_names import Place


@dataclass(frozen=True)
class SingleFileParts:
    """The content of a single file: state dicts with diffusers' names, their configs, and the header's text entries."""

    states: dict[str, dict[str, Tensor]]
    configs: dict[str, Config]
    metadata: dict[str, str]


def write_single_file(
    states: Mapping[str, Mapping[str, Tensor]],
    path: str | os.PathLike[str],
    *,
    configs: Mapping[str, Config],
    scheduler: Mapping[str, object],
    header: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a model's state dicts as `.safetensors` or `.ckpt` in the webui's key layout.

    ``states`` and ``configs``: by part, with diffusers' names. ``scheduler``: the noise schedule's config. ``dtype``:
    None keeps the precision of each tensor. A `.safetensors` is written one tensor at a time, without a second copy of
    the model in memory. If the U-Net does not predict noise, a `.yaml` of the same name is written beside the file for
    the webui, and an SDXL file gets empty tensors for ComfyUI. Raises FormatError for another suffix.
    """
    path = Path(path)
    state = to_single_file(states, configs)
    for name, mark in prediction_marks(scheduler, family_of(configs)).items():
        state.put(Place(name), mark)
    if path.suffix == ".ckpt":
        converted = {key: to_dtype(tensor, dtype) for key, tensor in state.items()}
        save_pickle({"state_dict": converted, "dreamfleet": dict(header)}, path)
    elif path.suffix == ".safetensors":
        write_safetensors(state, path, dtype=dtype, header=header)
    else:
        raise FormatError(f"{path}: a single file ends in .safetensors or .ckpt.")
    write_original_config(path, configs, scheduler)
    return path


def load_single_file_parts(
    path: str | os.PathLike[str],
    *,
    configs: Mapping[str, Config] | None = None,
    needs: Collection[str] = NEEDS,
) -> SingleFileParts:
    """Read the parts in `needs` from a `.safetensors` or `.ckpt`.

    `configs` override those in the file and the family's defaults. Raises FormatError for another kind of model, and
    for parts that are missing or do not fit their config.
    """
    path = Path(path)
    state, metadata = _read(path)
    every = configs_for(state, metadata, path, configs)
    try:
        states = from_single_file(state, every, needs=needs)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    return SingleFileParts(states, every, metadata)


def configs_for(
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: Path,
    given: Mapping[str, Config] | None = None,
) -> dict[str, Config]:
    """Return the configs of a single file's parts: those in `given`, in the header, and the family's published ones.

    Only the names and shapes of `state` are used. The scheduler's config has no `prediction_type` if none is declared.
    Raises FormatError for a model of an unsupported family.
    """
    found = {**configs_in(metadata, path), **(given or {})}
    family = family_of(found) if found else family_in(state, path)
    if "scheduler" in found:
        return {**FAMILY_CONFIGS[family], **found}
    declared = declared_schedule(state, metadata, path)
    at_512 = family == "sd2" and declared.get("prediction_type") == "epsilon"
    published = SD2_BASE_CONFIGS if at_512 else FAMILY_CONFIGS[family]
    scheduler = {**published["scheduler"], **declared}
    if family == "sd2" and "prediction_type" not in declared:
        del scheduler["prediction_type"]
    return {**published, **found, "scheduler": scheduler}


def _read(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    data = load_pickle(path)
    state = data.get("state_dict", data) if isinstance(data, dict) else None
    if not isinstance(state, dict):
        raise FormatError(f"{path}: holds no model; a .ckpt is a dict of tensors.")
    header = data.get("dreamfleet")
    header = header if isinstance(header, dict) else {}
    tensors = {key: value for key, value in state.items() if isinstance(key, str) and is_dense(value)}
    require_backed(tensors.values(), path)
    return (
        tensors,
        {str(key): value for key, value in header.items() if isinstance(value, str)},
    )
