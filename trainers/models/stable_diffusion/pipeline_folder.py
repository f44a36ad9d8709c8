"""Write a model as the folder that diffusers' pipelines load, with transformers 4 as well as 5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dreamfleet.trainers.models import embeddings
from dreamfleet.trainers.models.pretrained import save_part, save_tokenizer
from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion


def save_pipeline(model: StableDiffusion, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a folder that ``StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)`` loads.

    Of an SDXL, one that ``StableDiffusionXLPipeline`` loads. Weights are cast to ``dtype`` one by one while they are
    written (each part keeps its own when None).
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    embeddings.remove_embeddings(model)
    noise = DDIMScheduler.from_config(model.scheduler.config)
    tokenizers = {"tokenizer": model.tokenizer, "tokenizer_2": model.tokenizer_2}
    tokenizers = {name: tokenizer for name, tokenizer in tokenizers.items() if tokenizer is not None}
    parts: dict[str, Any] = {**model.modules(), **tokenizers, "scheduler": noise}
    _pipeline(parts, zeros_for_empty_prompt=model.zeros_for_empty_prompt).save_config(folder)
    noise.save_pretrained(folder / "scheduler")
    for name, part in model.modules().items():
        save_part(part, folder / name, dtype=dtype)
    for name, tokenizer in tokenizers.items():
        save_tokenizer(tokenizer, folder / name)


def _pipeline(parts: dict[str, Any], *, zeros_for_empty_prompt: bool) -> Any:
    """Make diffusers' pipeline of the parts, which knows what its index says."""
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
