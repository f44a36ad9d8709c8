"""Loads Stable Diffusion from a single file in the webui's key layout."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dreamfleet.datasets.errors import FormatError
from dreamfleet.trainers.models.formats.layout import empty_part, require_sane
from dreamfleet.trainers.models.formats.ldm_names import NEEDS, Config, family_of
from dreamfleet.trainers.models.formats.model_header import tokenizer_in
from dreamfleet.trainers.models.formats.prediction import predicts_velocity
from dreamfleet.trainers.models.formats.single_file import load_single_file_parts
from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion
from dreamfleet.trainers.models.stable_diffusion.sdxl import make_model


def load_single_file(
    path: str | os.PathLike[str], *, name: str | None = None, needs: Collection[str] = NEEDS
) -> StableDiffusion:
    """Load the parts in ``needs`` from a single file, in float32 on the CPU. The model's hashes are not set.

    ``text_encoder`` in ``needs`` stands for both text encoders of SDXL. Raises FormatError as `load_single_file_parts`,
    and ModelError if SD 1's tokenizer is needed but is neither on this machine nor available from the hub.
    """
    path = Path(path)
    read = load_single_file_parts(path, needs=needs)
    parts: dict[str, Any] = {}
    for part, state in read.states.items():
        module = empty_part(part, read.configs[part])
        while state:  # one tensor at a time, to limit the memory while half precision is converted to float32
            key, tensor = state.popitem()
            _assign(module, key, tensor.float())
        parts[part] = module.eval()
    scheduler = dict(read.configs["scheduler"])
    if "prediction_type" not in scheduler and "unet" in parts:
        _settle_prediction(parts["unet"], scheduler)
    family = family_of(read.configs)
    parts["tokenizer"] = tokenizer_in(read.metadata, path, family)
    if family == "sdxl":
        parts["tokenizer_2"] = tokenizer_in(read.metadata, path, family, second=True)
    return make_model(family, parts, scheduler=_make_schedule(scheduler, path), name=name or str(path))


def _make_schedule(config: Config, path: Path) -> Any:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    try:
        require_sane(config, "scheduler")
        scheduler = DDPMScheduler.from_config(config)
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"unknown prediction_type {scheduler.config.prediction_type!r}")
    except Exception as error:  # an invalid config in a file can raise any exception
        raise FormatError(f"{path}: its scheduler config is not a noise schedule ({error}).") from error
    return scheduler


def _settle_prediction(unet: Any, scheduler: Config) -> None:
    # Neither the file nor a .yaml beside it states the prediction type. Running the U-Net once shows it, and with it
    # which of the published models this is (trained at 768 or 512 pixels).
    velocity = predicts_velocity(unet)
    scheduler["prediction_type"] = "v_prediction" if velocity else "epsilon"
    unet.register_to_config(sample_size=96 if velocity else 64)


def _assign(module: nn.Module, key: str, tensor: Tensor) -> None:
    owner_name, _, leaf = key.rpartition(".")
    setattr(module.get_submodule(owner_name), leaf, nn.Parameter(tensor, requires_grad=False))
