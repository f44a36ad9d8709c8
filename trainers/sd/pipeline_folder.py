"""Writes a model as the folder that diffusers' pipelines load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dreamfleet.trainers.sd import embeddings
from dreamfleet.trainers.sd.formats.tensor_files import to_dtype
from dreamfleet.trainers.sd.model import StableDiffusion


def save_pipeline(model: StableDiffusion, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a folder that ``StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)`` loads.

    Of an SDXL, one that ``StableDiffusionXLPipeline`` loads.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    embeddings.remove_embeddings(model)
    parts: dict[str, Any] = {
        name: part if dtype is None or dtype == part.dtype else _copied(part, dtype)
        for name, part in model.modules().items()
    }
    noise = DDIMScheduler.from_config(model.scheduler.config)
    parts |= {"tokenizer": model.tokenizer, "scheduler": noise, "feature_extractor": None}
    if model.is_sdxl:
        from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
            StableDiffusionXLPipeline,
        )

        StableDiffusionXLPipeline(
            **parts,
            tokenizer_2=model.tokenizer_2,
            force_zeros_for_empty_prompt=model.zeros_for_empty_prompt,
            add_watermarker=False,
        ).save_pretrained(folder)
        return
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False).save_pretrained(
        folder
    )


def _copied(part: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a part to the host in ``dtype``, tensor by tensor: a card has no room for it twice."""
    copies: dict[int, Any] = {}
    for tensor in (*part.parameters(), *part.buffers()):
        made = to_dtype(tensor, dtype)
        copies[id(tensor)] = nn.Parameter(made, False) if isinstance(tensor, nn.Parameter) else made
    return copy.deepcopy(part, copies)
