"""DreamBooth: the U-Net (and, on request, the text encoder) learns a subject under a rare word.

Source: Ruiz et al. 2022 (arXiv 2208.12242); prior preservation is its equation 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import nn

from dreamfleet.datasets import captions
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.methods.base import (
    Method,
    MethodConfig,
    ParamGroup,
    Prior,
    Sample,
    Setting,
    register,
)
from dreamfleet.trainers.sd.formats.single_file import save_single_file
from dreamfleet.trainers.sd.model import StableDiffusion, save_pipeline


class DreamBoothConfig(MethodConfig):
    """The ``method:`` section of DreamBooth."""

    name: Literal["dreambooth"] = "dreambooth"
    train_text_encoder: bool = False
    with_prior_preservation: bool = False
    prior_loss_weight: float = Field(1.0, ge=0)
    num_class_images: int = Field(100, ge=1, description="per concept; missing ones are generated")
    sample_batch_size: int = Field(4, ge=1, description="class pictures generated at a time")
    prior_generation_steps: int = Field(50, ge=1, description="sampler steps of a generated class picture")
    prior_generation_guidance: float = Field(7.5, ge=1)


@register
class DreamBooth(Method):
    """Teach the model a subject: all of the U-Net learns, details are kept. A whole new checkpoint."""

    name: ClassVar[str] = "dreambooth"
    Config = DreamBoothConfig
    formats = ("diffusers", "safetensors")
    all_formats = ("diffusers", "safetensors", "ckpt")

    def __init__(self, config: DreamBoothConfig, model: StableDiffusion, setting: Setting):
        super().__init__(config, model, setting)
        for concept in setting.concepts:
            if config.with_prior_preservation and not concept.class_prompt:
                raise RecipeError(
                    "method.with_prior_preservation needs data.class_prompt (what the subject is: 'a photo of a cat') "
                    "for every concept"
                )
        # One module holds all that learns, so that one engine (DDP, DeepSpeed) wraps it all.
        self.learning = nn.ModuleDict({"unet": model.unet})
        model.unet.requires_grad_(True).train()
        if config.train_text_encoder:
            self.learning["text_encoder"] = model.text_encoder
            model.text_encoder.requires_grad_(True).train()
            if (
                model.clip_skip > 1
            ):  # the skipped layers never run, and a parameter without gradient stalls DDP
                layers = getattr(model.text_encoder, "text_model", model.text_encoder).encoder.layers
                for layer in layers[len(layers) + 1 - model.clip_skip :]:
                    layer.requires_grad_(False)

    @property
    def trains_text(self) -> bool:
        return self.config.train_text_encoder

    @property
    def prior(self) -> Prior | None:
        config = self.config
        if not config.with_prior_preservation:
            return None
        return Prior(
            num_class_images=config.num_class_images,
            loss_weight=config.prior_loss_weight,
            steps=config.prior_generation_steps,
            guidance_scale=config.prior_generation_guidance,
            batch_size=config.sample_batch_size,
        )

    def groups(self) -> list[ParamGroup]:
        return [
            ParamGroup(part, {f"{part}.{n}": p for n, p in module.named_parameters() if p.requires_grad})
            for part, module in self.learning.items()
        ]

    def prompt(self, sample: Sample, rng: np.random.Generator, data: Any) -> str:
        """Use the picture's caption, else the concept's prompt; ``[filewords]`` in that is the caption."""
        concept = self.setting.concepts[sample.concept]
        prompt = concept.class_prompt if sample.role == "class" else concept.instance_prompt
        return captions.make_caption(sample.caption, prompt=prompt, rng=rng, config=data)

    def export(
        self,
        folder: Path,
        name: str,
        *,
        formats: Sequence[str] | None,
        step: int,
        metadata: dict[str, str],
        precision: str,
    ) -> list[Path]:
        """Write ``diffusers/`` and ``NAME.safetensors`` (single file, webui keys); ``NAME.ckpt`` on request."""
        import torch

        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        paths = []
        for form in self.chosen_formats(formats):
            if form == "diffusers":
                save_pipeline(self.model, folder / "diffusers", dtype=dtype)
                paths.append(folder / "diffusers")
            else:
                save_single_file(self.model, folder / f"{name}.{form}", dtype=dtype, metadata=metadata)
                paths.append(folder / f"{name}.{form}")
        return paths
