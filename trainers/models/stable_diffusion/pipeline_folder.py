"""Write a model as the folder that diffusers' pipelines load, with transformers 4 as well as 5."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dreamfleet.trainers.models.pretrained import save_part, save_tokenizer


def save_pipeline(
    modules: Mapping[str, nn.Module],
    folder: Path,
    *,
    tokenizers: Mapping[str, Any],
    scheduler: Any,
    zeros_for_empty_prompt: bool,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a folder that ``StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)`` loads.

    With ``tokenizer_2`` it is one for ``StableDiffusionXLPipeline``. Weights are cast to ``dtype`` one by one while
    they are written (None: each part keeps its own).
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    schedule = DDIMScheduler.from_config(scheduler.config)
    parts: dict[str, Any] = {**modules, **tokenizers, "scheduler": schedule}
    _pipeline(parts, zeros_for_empty_prompt=zeros_for_empty_prompt).save_config(folder)
    schedule.save_pretrained(folder / "scheduler")
    for name, part in modules.items():
        save_part(part, folder / name, dtype=dtype)
    for name, tokenizer in tokenizers.items():
        save_tokenizer(tokenizer, folder / name)


def _pipeline(parts: dict[str, Any], *, zeros_for_empty_prompt: bool) -> Any:
    """Return diffusers' pipeline of the parts, which writes the index file."""
    if "tokenizer_2" in parts:
        from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
            StableDiffusionXLPipeline,
        )

        return StableDiffusionXLPipeline(
            **parts, force_zeros_for_empty_prompt=zeros_for_empty_prompt, add_watermarker=False
        )
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
