"""DreamBooth: fine-tunes the U-Net (and, on request, the text encoder) on a subject named by a rare word.

Source: Ruiz et al. 2022 (arXiv 2208.12242); prior preservation is its equation 2.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dreamfleet.datasets import captions
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.config.methods.dreambooth import DreamBoothConfig
from dreamfleet.trainers.methods.base import Sample, Setting
from dreamfleet.trainers.methods.diffusion_method import Prior
from dreamfleet.trainers.methods.whole_model import WholeModelMethod
from dreamfleet.trainers.models.family import DiffusionModel


class DreamBooth(WholeModelMethod):
    """Fine-tune the model on a subject, with its details. Exports a whole checkpoint, or a LoRA."""

    def __init__(self, config: DreamBoothConfig, model: DiffusionModel, setting: Setting):
        for concept in setting.concepts:
            if config.with_prior_preservation and not concept.class_prompt:
                raise RecipeError(
                    "method.with_prior_preservation needs data.class_prompt (what the subject is: 'a photo of a cat') "
                    "for every concept"
                )
        super().__init__(config, model, setting)

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

    def prompt(self, sample: Sample, rng: np.random.Generator, data: Any) -> str:
        """Return the image's caption, or the concept's prompt (for class images the class prompt).

        The prompt is used without a caption, or if it has ``[filewords]``, which the caption replaces.
        """
        concept = self.setting.concepts[sample.concept]
        prompt = concept.class_prompt if sample.role == "class" else concept.instance_prompt
        return captions.make_caption(
            sample.caption,
            prompt=prompt,
            file_name=sample.file_name,
            rng=rng,
            config=data,
            of_subject=sample.role != "class",
        )
