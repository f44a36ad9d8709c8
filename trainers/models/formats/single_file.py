"""Stable Diffusion in one file: diffusers' parts under the key names of LDM and webui, and back.

Three layouts, one a family: `model.diffusion_model.` (U-Net) and `first_stage_model.` (VAE) in each, and the text
encoders in transformers' own names (SD1, SDXL's first) or OpenCLIP's (SD2, SDXL's second). Names follow from the
numbers of blocks and layers in the configs, so that unusual shapes, such as the pocket model's, convert too; their
configs and small tokenizers travel in the file.
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
from dreamfleet.trainers.models.formats.layout import (
    empty_part,
    family_in,
    from_single_file,
    require_sane,
    to_single_file,
)
from dreamfleet.trainers.models.formats.ldm_names import (
    FAMILY_CONFIGS,
    NEEDS,
    PARTS,
    SD2_BASE_CONFIGS,
    Config,
    family_of,
    parts_of,
)
from dreamfleet.trainers.models.formats.model_header import config_of, configs_in, model_header, tokenizer_in
from dreamfleet.trainers.models.formats.original_config import write_original_config
from dreamfleet.trainers.models.formats.pickle_writer import (
    is_dense,
    load_pickle,
    require_backed,
    save_pickle,
)
from dreamfleet.trainers.models.formats.prediction import prediction_marks, predicts_velocity, told_schedule
from dreamfleet.trainers.models.formats.tensor_files import read_safetensors, to_dtype, write_safetensors
from dreamfleet.trainers.models.formats.text_names import Place

if TYPE_CHECKING:
    from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion


@dataclass(frozen=True)
class SingleFileParts:
    """What a single file holds: state dicts under diffusers' names, the configs they fit, the header's text entries."""

    states: dict[str, dict[str, Tensor]]
    configs: dict[str, Config]
    metadata: dict[str, str]


def save_single_file(
    model: StableDiffusion,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write the whole model as `.safetensors` or `.ckpt` in webui's key layout, in `dtype` (each part's own when None).

    A `.safetensors` is written tensor by tensor, so no second copy of the model is held. `metadata` joins the header.
    Where the U-Net does not predict noise, a same-named `.yaml` beside the file says so, which the webui reads, and in
    an SDXL's file empty tensors, which ComfyUI reads.
    """
    path = Path(path)
    parts = model.modules()
    configs = {part: config_of(module) for part, module in parts.items()}
    if missing := [part for part in parts_of(family_of(configs)) if part not in parts]:
        raise ModelError(f"{path}: a single file needs the whole model; {', '.join(missing)} not loaded.")
    state = to_single_file({part: module.state_dict() for part, module in parts.items()}, configs)
    for name, mark in prediction_marks(model.scheduler.config, family_of(configs)).items():
        state.put(Place(name), mark)
    header = {**model_header(model, configs, title=path.stem), **(metadata or {})}
    if path.suffix == ".ckpt":
        converted = {key: to_dtype(tensor, dtype) for key, tensor in state.items()}
        save_pickle({"state_dict": converted, "dreamfleet": header}, path)
    elif path.suffix == ".safetensors":
        write_safetensors(state, path, dtype=dtype, header=header)
    else:
        raise FormatError(f"{path}: a single file ends in .safetensors or .ckpt.")
    write_original_config(path, configs, model.scheduler.config)
    return path


def load_single_file_parts(
    path: str | os.PathLike[str],
    *,
    configs: Mapping[str, Config] | None = None,
    needs: Collection[str] = NEEDS,
) -> SingleFileParts:
    """Read a `.safetensors` or `.ckpt`; `configs` overrule the ones in the file or its family's own.

    Raises FormatError for another kind of model, and for parts that are missing or do not fit their config.
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
    """Find the configs of a single file: `given` ones, our header's, and the family's published ones for the rest.

    Of `state` only names and shapes count. A scheduler's config without `prediction_type` means that nothing tells it.
    Raises FormatError for a model of another family.
    """
    found = {**configs_in(metadata, path), **(given or {})}
    family = family_of(found) if found else family_in(state, path)
    if "scheduler" in found:
        return {**FAMILY_CONFIGS[family], **found}
    told = told_schedule(state, metadata, path)
    at_512 = family == "sd2" and told.get("prediction_type") == "epsilon"
    published = SD2_BASE_CONFIGS if at_512 else FAMILY_CONFIGS[family]
    scheduler = {**published["scheduler"], **told}
    if family == "sd2" and "prediction_type" not in told:
        del scheduler["prediction_type"]
    return {**published, **found, "scheduler": scheduler}


def load_single_file(
    path: str | os.PathLike[str], *, name: str | None = None, needs: Collection[str] = NEEDS
) -> StableDiffusion:
    """Load a model from a single file, in float32 on the CPU; its `content_hash` is left empty.

    Raises FormatError as `load_single_file_parts`, ModelError when SD1's tokenizer is not on this machine.
    """
    from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion

    parts = load_single_file_parts(path, needs=needs)
    modules: dict[str, Any] = dict.fromkeys(PARTS)
    for part, state in parts.states.items():
        module = empty_part(part, parts.configs[part])
        while state:  # one by one, so that a half-precision file is never held twice in full precision
            key, tensor = state.popitem()
            _assign(module, key, tensor.float())
        modules[part] = module.eval()
    scheduler = dict(parts.configs["scheduler"])
    if "prediction_type" not in scheduler and modules["unet"] is not None:
        _settle_prediction(modules["unet"], scheduler)
    family, where = family_of(parts.configs), Path(path)
    if family == "sdxl":
        modules["tokenizer_2"] = tokenizer_in(parts.metadata, where, family, second=True)
        modules["zeros_for_empty_prompt"] = True  # as the webui draws with every SDXL
    return StableDiffusion(
        tokenizer=tokenizer_in(parts.metadata, where, family),
        scheduler=_noise_of(scheduler, where),
        folder=name or str(path),
        content_hash="",
        **modules,
    )


def _noise_of(config: Config, path: Path) -> Any:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    try:
        require_sane(config, "scheduler")
        scheduler = DDPMScheduler.from_config(config)
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"nothing predicts {scheduler.config.prediction_type!r}")
    except Exception as error:  # a config from a file can be wrong in any way
        raise FormatError(f"{path}: its scheduler config makes no noise schedule ({error}).") from error
    return scheduler


def _settle_prediction(unet: Any, scheduler: Config) -> None:
    # Nothing in the file or beside it tells: a trial does, and with it which of the two published models this is.
    velocity = predicts_velocity(unet)
    scheduler["prediction_type"] = "v_prediction" if velocity else "epsilon"
    unet.register_to_config(sample_size=96 if velocity else 64)


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
    tensors = {key: value for key, value in state.items() if isinstance(key, str) and is_dense(value)}
    require_backed(tensors.values(), path)
    return (
        tensors,
        {str(key): value for key, value in header.items() if isinstance(value, str)},
    )
