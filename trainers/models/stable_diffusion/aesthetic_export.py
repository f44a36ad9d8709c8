"""Bakes an aesthetic vector into weights: a text encoder tuned over a list of prompts, usable in plain diffusers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.models.stable_diffusion.aesthetic import (
    AestheticEncoder,
    AestheticSettings,
    tune_text_encoder,
)
from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion
from dreamfleet.trainers.models.vision.clip import ClipScorer


@dataclass(frozen=True)
class Baked:
    """A tuned text encoder, and measures of how well it approximates tuning for each prompt separately.

    The cosines are means over the prompts. ``difference`` is the distance of its encodings from those of per-prompt
    tuning, divided by that of the untuned encoder's: 0 means equal, 1 no better than the untuned encoder.
    """

    text_encoder: Any
    num_prompts: int
    cosine_before: float
    cosine_tuned: float
    cosine_per_prompt: float
    difference: float

    def figures(self) -> dict[str, float]:
        """Return the measures by name, without the text encoder."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "text_encoder"
        }


def bake(
    model: StableDiffusion,
    vector: Tensor,
    prompts: Sequence[str],
    *,
    clip: ClipScorer,
    settings: AestheticSettings,
) -> Baked:
    """Tune one copy of the text encoder towards a vector ``[1, P]`` over all prompts together.

    ``settings`` are those of per-prompt tuning, except that ``weight`` interpolates the weights instead of the
    encodings. Unlike per-prompt tuning, this also changes the encoding of the empty prompt. Raises UserError for
    settings or prompts that change nothing.
    """
    prompts = [prompt for prompt in dict.fromkeys(prompts) if prompt.strip()]
    if not (prompts and settings.steps and settings.learning_rate and settings.weight):
        raise UserError("there is nothing to bake: give prompts, and steps, learning rate and weight above 0")
    encoder = AestheticEncoder(model, vector, clip=clip, settings=settings)
    ids_BT = model.tokenize(prompts).to(next(model.text_encoder.parameters()).device)
    tuned, cosines = tune_text_encoder(
        model,
        ids_BT,
        encoder.target.to(ids_BT.device),
        projection=clip.text_projection.to(ids_BT.device),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
    )
    with torch.no_grad():
        for param, own in zip(tuned.parameters(), model.text_encoder.parameters(), strict=True):
            param.lerp_(own.float(), 1 - settings.weight)
        apart, plain = encoder.contexts(prompts).float(), model.encode_text(ids_BT).float()
        baked = dataclasses.replace(model, text_encoder=tuned).encode_text(ids_BT)
        shares = (baked - apart).flatten(1).norm(dim=1) / (plain - apart).flatten(1).norm(dim=1)
    each = [encoder.cosines[prompt][-1] for prompt in prompts]
    return Baked(tuned, len(prompts), cosines[0], cosines[-1], sum(each) / len(each), float(shares.mean()))
