"""Loads Stable Diffusion from a single file in the webui's layout, and saves it as one."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreamfleet.datasets.errors import FormatError, ModelError
from dreamfleet.trainers.models.formats.layout import empty_part, require_sane
from dreamfleet.trainers.models.formats.ldm_names import NEEDS, PARTS, Config, family_of, parts_of
from dreamfleet.trainers.models.formats.model_header import config_of, model_header, tokenizer_in
from dreamfleet.trainers.models.formats.prediction import predicts_velocity
from dreamfleet.trainers.models.formats.single_file import load_single_file_parts, write_single_file
from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion


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
    tokenizers = {"tokenizer": model.tokenizer, "tokenizer_2": model.tokenizer_2}
    header = model_header(
        configs,
        scheduler=model.scheduler.config,
        tokenizers={name: tokenizer for name, tokenizer in tokenizers.items() if tokenizer is not None},
        resolution=model.resolution,
        title=path.stem,
    )
    return write_single_file(
        {part: module.state_dict() for part, module in parts.items()},
        path,
        configs=configs,
        scheduler=model.scheduler.config,
        header={**header, **(metadata or {})},
        dtype=dtype,
    )


def load_single_file(
    path: str | os.PathLike[str], *, name: str | None = None, needs: Collection[str] = NEEDS
) -> StableDiffusion:
    """Load a model from a single file, in float32 on the CPU; its `content_hash` is left empty.

    Raises FormatError as `load_single_file_parts`, ModelError when SD1's tokenizer is not on this machine.
    """
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
