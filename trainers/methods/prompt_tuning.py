"""Advanced Prompt Tuning (DreamArtist): a positive and a negative word learn together, through guidance.

Source: Dong et al. 2022 (arXiv 2211.11337); their webui extension, `scripts/dream_artist/cptuning.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import AfterValidator, AliasChoices, Field, model_validator
from torch import Tensor, nn

from dreamfleet.datasets.errors import ModelError
from dreamfleet.datasets.index.template_files import load_templates
from dreamfleet.trainers.methods.base import (
    Batch,
    Loss,
    Method,
    MethodConfig,
    ParamGroup,
    Sample,
    Setting,
    register,
)
from dreamfleet.trainers.methods.embedding_common import (
    WORD_FORMATS,
    check_templates,
    export_word,
    fill_prompt,
    initial_vectors,
    word_parameters,
)
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.models.embeddings import (
    NEGATIVE,
    install_embedding,
    install_negative,
)
from dreamfleet.trainers.models.stable_diffusion.guidance import guided_prediction, parse_guidance
from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion
from dreamfleet.trainers.models.stable_diffusion.noise import clean_estimate, prediction_loss
from dreamfleet.trainers.models.stable_diffusion.prompt_tokens import place_word
from dreamfleet.trainers.models.vision.discriminator import Discriminator, load_discriminator

NEGATIVE_NOISE = (
    1e-3  # standard deviation of what tells the negative's vectors from the positive's at the start
)


def _check_guidance(value: float | str) -> float | str:
    parse_guidance(value)
    return value


class PromptTuningConfig(MethodConfig):
    """The ``method:`` section of Advanced Prompt Tuning."""

    name: Literal["prompt_tuning"] = "prompt_tuning"
    placeholder_token: str = Field(
        min_length=1,
        validation_alias=AliasChoices("placeholder_token", "token_string", "trigger_word"),
        description="the word in prompts; the negative's is the same with -neg",
    )
    initializer_token: str = Field(
        "*",
        validation_alias=AliasChoices("initializer_token", "init_word", "initialization_text"),
        description="what both start from; the negative with a little noise",
    )
    num_vectors: int = Field(
        3,
        ge=1,
        le=75,
        validation_alias=AliasChoices("num_vectors", "num_vectors_per_token", "vectors_per_token"),
        description="vectors of the word; more hold more detail and take more of the prompt",
    )
    num_vectors_neg: int = Field(6, ge=1, le=75, description="vectors of the negative")
    cfg_scale: Annotated[float | str, AfterValidator(_check_guidance)] = Field(
        3.0,
        description="guidance trained through, fixed or low-high by the timestep with a curve (ln, cos, cos2): "
        "1.5-3.0:cos; draw with about the same",
    )
    neg_lr_w: float = Field(
        1.0,
        gt=0,
        validation_alias=AliasChoices("neg_lr_w", "negative_lr_scale"),
        description="times the learning rate, for the negative",
    )
    rec_loss_w: float = Field(
        0.0,
        ge=0,
        validation_alias=AliasChoices("rec_loss_w", "reconstruction_loss_weight"),
        description="weight of the reconstruction loss: the estimated picture, decoded, against the real one; 0.01 "
        "to 1, and more memory",
    )
    discriminator: str | None = Field(
        None,
        description="a classifier that judges the estimated picture, decoded: what method discriminator exports, "
        "DreamArtist's .pth, a ConvNeXt on the hub; more memory",
    )
    discriminator_class: int = Field(1, ge=0, description="number of the class the pictures are to be of")
    discriminator_loss_w: float = Field(
        1.0, ge=0, description="weight of the discriminator's loss, 1 - probability of that class"
    )
    discriminator_replaces: bool = Field(
        False, description="learn from the discriminator's loss alone, as DreamArtist does"
    )
    template_file: str = Field(
        "subject",
        description="a prompt a line, with [name] and [filewords]; or a set's name: style, subject_filewords",
    )
    negative_prompt: str | None = Field(
        None,
        description="what the negative is trained in, with [name] for its word; when left out the picture's own "
        "prompt with that word",
    )

    @model_validator(mode="after")
    def _check_negative(self) -> Self:
        if self.negative_prompt is not None and "[name]" not in self.negative_prompt:
            raise ValueError(
                f"negative_prompt: {self.negative_prompt!r} has no [name], so the negative would never learn"
            )
        return self

    @model_validator(mode="after")
    def _check_discriminator(self) -> Self:
        if self.discriminator_replaces and self.discriminator is None:
            raise ValueError("discriminator_replaces: true needs a discriminator to learn from; name one")
        if self.discriminator_replaces and self.rec_loss_w:
            raise ValueError(
                "rec_loss_w does not go with discriminator_replaces: true, which learns from the discriminator alone; "
                "leave one of them out"
            )
        return self


@register
class PromptTuning(Method):
    """Teach a new word and what to steer away from, from one picture: vectors for the prompt and its negative."""

    name: ClassVar[str] = "prompt_tuning"
    Config = PromptTuningConfig
    formats = ("pt", "safetensors")
    all_formats = WORD_FORMATS

    def __init__(self, config: PromptTuningConfig, model: StableDiffusion, setting: Setting):
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
        """Raise RecipeError where no prompt has the word; return a warning where some lack it."""
        return check_templates(self.model, self._templates, self._word, samples, data)

    def prompt(self, sample: Sample, rng: np.random.Generator, data: Any) -> str:
        """Fill a template line drawn for this use of the picture with the placeholder and the picture's caption."""
        return fill_prompt(self._templates, self._word, sample, rng, data)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Turn prompts into ids ``[B, 2, 77]``: of what each is trained against, and its own.

        ``[B, 2, 2, 77]`` for SDXL's two text encoders.
        """
        word, template = self._word, self.config.negative_prompt
        if template is None:
            negatives = self.model.tokenize(prompts, {word: word + NEGATIVE})
        else:
            filled = place_word(template, "[name]", word + NEGATIVE)
            negatives = self.model.tokenize([filled] * len(prompts))
        return torch.stack([negatives, self.model.tokenize(prompts)], dim=1)

    def sample_losses(self, batch: Batch, *, snr_gamma: float | None = None) -> Tensor:
        """Compute the noise loss of each sample ``[N]``, of the guided prediction."""
        return self._noise_losses(batch, self._predict(batch)[1], snr_gamma)

    def forward(self, batch: Batch) -> Loss:
        """Compute the noise loss of the guided prediction, plus the weighted losses of the decoded picture."""
        noisy, predicted = self._predict(batch)
        per_sample = self._noise_losses(batch, predicted, self.setting.snr_gamma)
        extras = {}
        if judged := self._image_losses(batch, noisy, predicted):
            every = {"noise_loss": per_sample, **{name: loss for name, (loss, _) in judged.items()}}
            extras = {name: loss.detach().mean() for name, loss in every.items()}
            if self.config.discriminator_replaces:
                per_sample = torch.zeros_like(per_sample)
            for loss, weight in judged.values():
                per_sample = per_sample + weight * loss
        total = (per_sample * batch["weights"]).sum() / batch["num_instances"]
        return Loss(total, per_sample.detach(), extras)

    def export(self, order: Export) -> list[Path]:
        """Write ``NAME.pt`` and ``NAME-neg.pt`` (webui), and the same as ``.safetensors`` (diffusers)."""
        paths = []
        for vectors, ending in ((self._positive, ""), (self._negative, NEGATIVE)):
            paths += export_word(
                list(vectors.values()),
                replace(self.settled(order), name=order.name + ending),
                word=self._word + ending,
                model=self.model,
            )
        return paths

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the noised latents and the guided prediction, each ``[N, C, H, W]``."""
        model, timesteps = self.model, batch["timesteps"]
        noisy = model.scheduler.add_noise(batch["latents"], batch["noise"], timesteps)
        ids = batch["input_ids"]
        pairs = model.condition(ids.flatten(0, 1)).map(lambda tensor: tensor.unflatten(0, ids.shape[:2]))
        if "time_ids" in batch:  # both sides of a pair are of the same picture
            pairs = pairs.sized(batch["time_ids"][:, None].expand(-1, 2, -1))
        scale = self._guidance.at(timesteps, model.scheduler.config.num_train_timesteps)
        return noisy, guided_prediction(model.unet, noisy, timesteps, pairs, scale)

    def _noise_losses(self, batch: Batch, predicted: Tensor, snr_gamma: float | None) -> Tensor:
        return prediction_loss(
            self.model.scheduler,
            predicted,
            latents=batch["latents"],
            noise=batch["noise"],
            timesteps=batch["timesteps"],
            snr_gamma=snr_gamma,
            mask=batch.get("mask"),
        )

    def _image_losses(
        self, batch: Batch, noisy: Tensor, predicted: Tensor
    ) -> dict[str, tuple[Tensor, float]]:
        """Decode what the prediction makes of each picture and judge it: losses ``[N]`` and weights, by name.

        Reconstruction is the mean absolute difference from the picture, in pixels. That is its latents decoded, not the
        file: cached latents have no file at hand, and what the VAE itself loses cannot be learned. The discriminator's
        loss is what lacks to certainty that the picture is of its class.
        """
        model, config = self.model, self.config
        found: dict[str, tuple[Tensor, float]] = {}
        if not config.rec_loss_w and not self._judges:
            return found
        pixels = model.decode(clean_estimate(model.scheduler, predicted, noisy, batch["timesteps"]))
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
