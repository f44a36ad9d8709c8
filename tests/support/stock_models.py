"""Loads saved models with this project and with diffusers' pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.models.family import DiffusionModel, load_model


def load(folder: Path, **options: Any) -> DiffusionModel:
    return load_model(ModelConfig(pretrained_model_name_or_path=str(folder), **options))


def stock_pipeline(folder: Path, family: str) -> Any:
    """Return the diffusers pipeline of a folder."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    if family == "sdxl":
        pipeline: Any = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
