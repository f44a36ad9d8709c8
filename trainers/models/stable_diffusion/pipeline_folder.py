"""Writes a model as a folder for diffusers pipelines, readable with transformers 4 and 5."""

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

    If ``tokenizers`` has ``tokenizer_2``, the folder is for ``StableDiffusionXLPipeline``. Weights are cast to
    ``dtype`` one at a time while they are written; with None each part keeps its own.
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
    """Return a diffusers pipeline of the parts, used to write model_index.json."""
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
