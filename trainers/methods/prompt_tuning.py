"""Advanced Prompt Tuning (DreamArtist): trains a positive and a negative embedding jointly, with guidance.

Source: Dong et al. 2022 (arXiv 2211.11337); their webui extension, `scripts/dream_artist/cptuning.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dreamfleet.datasets.errors import ModelError
from dreamfleet.datasets.index.template_files import load_templates
from dreamfleet.trainers.config.guidance import parse_guidance
from dreamfleet.trainers.config.methods.prompt_tuning import PromptTuningConfig
from dreamfleet.trainers.methods.base import Batch, Loss, Sample, Setting
from dreamfleet.trainers.methods.diffusion_method import DenoiserInputs, DiffusionMethod
from dreamfleet.trainers.methods.embedding_common import (
    check_templates,
    export_word,
    fill_prompt,
    initial_vectors,
    word_parameters,
)
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.models.condition import Condition
from dreamfleet.trainers.models.embeddings import install_embedding, install_negative
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.models.formats.file_names import NEGATIVE
from dreamfleet.trainers.models.guidance import guidance_at, guide, pair_inputs
from dreamfleet.trainers.models.learned_words import place_word
from dreamfleet.trainers.models.vision.discriminator import Discriminator, load_discriminator
from dreamfleet.trainers.optim.param_group import ParamGroup

# Standard deviation of the noise that makes the negative's initial vectors differ from the positive's.
NEGATIVE_NOISE = 1e-3


class PromptTuning(DiffusionMethod):
    """Train a new word, even from one image: vectors for the prompt and for the negative prompt."""

    formats = ("pt", "safetensors")
    files_per_format = 2  # the word and its negative

    def __init__(self, config: PromptTuningConfig, model: DiffusionModel, setting: Setting):
        super().__init__(config, model, setting)
        positive = initial_vectors(model, config.initializer_token, config.num_vectors)
        negative = initial_vectors(model, config.initializer_token, config.num_vectors_neg)
        negative = [tensor + NEGATIVE_NOISE * torch.randn_like(tensor) for tensor in negative]
        self._positive = word_parameters(self, "positive", positive)
        self._negative = word_parameters(self, "negative", negative)
        self._word, self._guidance = config.placeholder_token, parse_guidance(config.cfg_scale)
        install_embedding(model, self._word, *self._positive.values())
        install_negative(model, self._word, *self._negative.values())
        self._templates = load_templates(config.template_file)
        self._judges: list[Discriminator] = []
        if config.discriminator is not None:
            self._judges.append(_load_judge(config.discriminator, config.discriminator_class))

    @property
    def trains_text(self) -> bool:
        return True

    @property
    def helpers(self) -> dict[str, nn.Module]:
        return {"discriminator": self._judges[0].network} if self._judges else {}

    def groups(self) -> list[ParamGroup]:
        return [
            ParamGroup("positive", dict(self._positive)),
            ParamGroup("negative", dict(self._negative), self.config.neg_lr_w),
        ]

    def check_prompts(self, samples: Sequence[Sample], data: Any) -> str | None:
        """Return a warning if some prompts lack the word, else None. Raises RecipeError if all lack it."""
        return check_templates(self.model, self._templates, self._word, samples, data)

    def prompt(self, sample: Sample, rng: np.random.Generator, data: Any) -> str:
        """Return a random template, filled with the placeholder token and the image's caption."""
        return fill_prompt(self._templates, self._word, sample, rng, data)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids ``[B, 2, T]``: those of each prompt's negative prompt, then those of the prompt.

        T is 77 per chunk. ``[B, 2, 2, T]`` for SDXL's two text encoders.
        """
        word, template = self._word, self.config.negative_prompt
        if template is None:
            negatives = self.model.tokenize(prompts, {word: word + NEGATIVE})
        else:
            filled = place_word(template, "[name]", word + NEGATIVE)
            negatives = self.model.tokenize([filled] * len(prompts))
        return torch.stack([negatives, self.model.tokenize(prompts)], dim=1)

    def text_ids(self, batch: Batch) -> Tensor:
        """Return the token ids ``[2 N, ..., T]``: each sample's negative prompt, then its prompt."""
        return batch["input_ids"].flatten(0, 1)

    def denoiser_inputs(self, batch: Batch, encoded: Condition | None) -> DenoiserInputs:
        """Return the denoiser's inputs for the negative prompts of all samples, then for their prompts."""
        assert encoded is not None
        timesteps, ids = batch["timesteps"], batch["input_ids"]
        noisy = self.noised(batch)
        pairs = encoded.map(lambda tensor: tensor.unflatten(0, ids.shape[:2]))
        if "time_ids" in batch:  # both prompts of a pair belong to the same image
            pairs = pairs.with_sizes(batch["time_ids"][:, None].expand(-1, 2, -1))
        return DenoiserInputs(*pair_inputs(noisy, timesteps, pairs))

    def combine(self, batch: Batch, predicted: Tensor) -> Tensor:
        """Return the guided prediction of each sample ``[N, C, H, W]``."""
        return guide(predicted, guidance_at(self._guidance, self.model.noise_level(batch["timesteps"])))

    def loss(self, batch: Batch, inputs: DenoiserInputs, predicted: Tensor) -> Loss:
        """Return the denoising loss of the guided prediction, plus the weighted losses of the decoded image.

        With ``method.discriminator_replaces``, the losses of the decoded image replace the denoising loss.
        """
        noisy, guided = inputs.noisy.chunk(2)[0], self.combine(batch, predicted)
        per_sample = self.model.loss(guided, batch, self.setting.loss)
        extras = {}
        if judged := self._image_losses(batch, noisy, guided):
            every = {"noise_loss": per_sample, **{name: loss for name, (loss, _) in judged.items()}}
            extras = {name: loss.detach().mean() for name, loss in every.items()}
            if self.config.discriminator_replaces:
                per_sample = torch.zeros_like(per_sample)
            for loss, weight in judged.values():
                per_sample = per_sample + weight * loss
        total = (per_sample * batch["weights"]).sum() / batch["num_instances"]
        return Loss(total, per_sample.detach(), extras)

    def write(self, order: Export) -> list[Path]:
        """Write ``NAME.pt`` and ``NAME-neg.pt`` (webui), and the same as ``.safetensors`` (diffusers)."""
        paths = []
        for vectors, ending in ((self._positive, ""), (self._negative, NEGATIVE)):
            paths += export_word(
                list(vectors.values()),
                replace(order, name=order.name + ending),
                word=self._word + ending,
                model=self.model,
            )
        return paths

    def _image_losses(
        self, batch: Batch, noisy: Tensor, predicted: Tensor
    ) -> dict[str, tuple[Tensor, float]]:
        """Return the losses ``[N]`` of the decoded image and their weights, by name.

        The decoded image is the prediction's estimate of the clean image. The reconstruction loss is its mean
        absolute pixel difference from the decoded latents of the training image. The image file is not used:
        it is not loaded when latents are cached, and what the VAE cannot represent cannot be learned. The
        discriminator's loss is 1 - the probability of its class.
        """
        model, config = self.model, self.config
        found: dict[str, tuple[Tensor, float]] = {}
        if not config.rec_loss_w and not self._judges:
            return found
        pixels = model.decode(model.clean_estimate(predicted, noisy, batch["timesteps"]))
        if config.rec_loss_w:
            with torch.no_grad():
                real = model.decode(batch["latents"])
            found["reconstruction_loss"] = (pixels - real).abs().flatten(1).mean(1), config.rec_loss_w
        for judge in self._judges:
            likely = judge.probabilities(pixels)[:, config.discriminator_class]
            found["discriminator_loss"] = 1 - likely, config.discriminator_loss_w
        return found


def _load_judge(name: str, wanted: int) -> Discriminator:
    found = load_discriminator(name)
    if wanted >= found.num_classes:
        raise ModelError(
            f"method.discriminator_class: {wanted}, but {name} knows the classes 0 to {found.num_classes - 1}"
        )
    return found
