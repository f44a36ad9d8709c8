"""Aesthetic Gradients: computes the mean CLIP vector of an image set, towards which sampling tunes prompts.

Sources: arXiv 2209.12330. The vector is that of the authors' `gen_aesthetic_embeddings.py` and of the webui
extension: the mean of CLIP's projected image features; neither features nor mean are normalised to unit
length.

Shape suffixes: N images, P width of CLIP's common space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamfleet.datasets.errors import ModelError, RecipeError
from dreamfleet.datasets.images.vision_transform import Fit
from dreamfleet.datasets.json_text import json_text
from dreamfleet.trainers.config.methods.aesthetic_gradients import AestheticGradientsConfig
from dreamfleet.trainers.methods.base import Batch, Loss, Setting
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.methods.image_method import ImageMethod, Use
from dreamfleet.trainers.methods.whole_model import export_checkpoints
from dreamfleet.trainers.models.condition import Condition
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.models.formats.aesthetic import write_aesthetic
from dreamfleet.trainers.models.stable_diffusion.aesthetic import (
    AestheticEncoder,
    clip_of,
    require_sd1,
    settings_of,
)
from dreamfleet.trainers.models.stable_diffusion.aesthetic_export import bake
from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion
from dreamfleet.trainers.models.vision.clip import ClipScorer
from dreamfleet.trainers.optim.param_group import ParamGroup

GROUP = "mean"


class Summation(torch.optim.Optimizer):
    """Subtracts the gradient from the parameters without a learning rate, so that they accumulate a sum."""

    def __init__(self, params: Any):
        super().__init__(params, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Subtract the gradients of the backward passes since the last step."""
        for group in self.param_groups:
            for param in group["params"]:
                param -= param.grad


class AestheticGradients(ImageMethod, DiffusionMethod):
    """Compute the mean CLIP vector of an image set. Exports kilobytes; sampling with it is slower.

    One pass over the set sums CLIP's features of the images and their number, each image once; further passes
    change nothing. So the vector is the exact mean for any batch size, any number of workers and after any
    resume.
    """

    formats = ("pt",)

    def __init__(self, config: AestheticGradientsConfig, model: DiffusionModel, setting: Setting):
        super().__init__(config, model, setting)
        # Both are sums over images, divided by the size of the global batch.
        self.features = nn.Parameter(torch.zeros(1, self.model.text_encoder.config.projection_dim))
        self.count = nn.Parameter(torch.zeros(1))
        self._clips: list[ClipScorer] = []
        self._encoders: list[AestheticEncoder] = []

    @property
    def all_formats(self) -> tuple[str, ...]:
        return ("pt", "diffusers")

    @property
    def model(self) -> StableDiffusion:
        """The model. Raises ModelError if it is not Stable Diffusion 1.x."""
        return require_sd1(self._model[0])

    @property
    def clip(self) -> ClipScorer:
        """The CLIP model, loaded at first use. Raises ModelError if its width P is not the text encoder's."""
        if not self._clips:
            found = clip_of(self.model, self.config.clip)
            if len(found.text_projection) != self.features.shape[1]:
                raise ModelError(
                    f"method.clip: {found.name}'s space has {len(found.text_projection)} dimensions, but the text "
                    f"encoder of {self.model.folder} says {self.features.shape[1]}; Aesthetic Gradients are for SD 1.x"
                )
            self._clips.append(found.to(self.features.device))
        return self._clips[0]

    @property
    def vector(self) -> Tensor:
        """The mean ``[1, P]`` of the images seen so far; zeros before the first."""
        return self.features.detach() / self.count.detach().clamp(min=torch.finfo(torch.float32).tiny)

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup(GROUP, {"features": self.features, "count": self.count})]

    def optimizer(self) -> torch.optim.Optimizer:
        return Summation([{"params": [self.features, self.count], "name": GROUP}])

    @property
    def fit(self) -> Fit:
        return self.clip.preprocessing.fit

    def collate(self, uses: Sequence[Use]) -> Batch:
        """Return ``clip_pixels [N, 3, S, S]`` and ``counted [N]``.

        ``counted`` is 1 in the first pass over the set, 0 later and for replacements of undecodable images.
        """
        return {
            "clip_pixels": self.clip.preprocessing([use.image for use in uses]),
            "counted": torch.tensor([float(use.epoch == 0 and not use.instead) for use in uses]),
        }

    def forward(self, batch: Batch) -> Loss:
        """Return 1 - cosine of the images and the mean so far; the gradient is minus the batch's sums.

        ``batch``: ``clip_pixels`` ``[N, 3, S, S]``, and ``counted`` ``[N]``, 0 for images that are not added.
        """
        features_NP = self.clip.embed(batch["clip_pixels"])
        per_sample = 1 - F.cosine_similarity(self.vector, features_NP)
        brought = ((features_NP * self.features).sum(dim=1) + self.count) * batch["counted"]
        # The value is the loss; the gradient is that of the sums, averaged over micro-batches and workers.
        total = per_sample.mean() - (brought - brought.detach()).mean()
        return Loss(total, per_sample, {})

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], ids: Tensor | None = None) -> Condition:
        """Encode prompts, tuned towards the mean of the images so far; untuned before the first image."""
        if not self.count:
            return super().encode(prompts, ids)
        vector = self.vector.cpu()
        if not self._encoders or not torch.equal(self._encoders[0].vector, vector):
            settings = settings_of(self.config)
            self._encoders = [AestheticEncoder(self.model, vector, clip=self.clip, settings=settings)]
        return self._encoders[0](prompts, ids)

    def write(self, order: Export) -> list[Path]:
        """Write ``NAME.pt`` as the webui's extension does: the vector as a tensor, in full precision.

        On request, write ``diffusers/``: the model with the vector baked into its text encoder, and
        ``baked.json`` with the error against tuning for each prompt. Raises RecipeError if that is requested
        without ``baked_prompts``.
        """
        paths = []
        for form in order.formats:
            if form == "pt":
                paths.append(write_aesthetic(self.vector, order.folder / f"{order.name}.pt"))
                continue
            if not any(prompt.strip() for prompt in self.config.baked_prompts):
                raise RecipeError("method.baked_prompts: name prompts to tune the text encoder over")
            baked = bake(
                self.model,
                self.vector,
                self.config.baked_prompts,
                clip=self.clip,
                settings=settings_of(self.config),
            )
            model = replace(self.model, text_encoder=baked.text_encoder)
            paths += export_checkpoints(model, replace(order, formats=(form,)))
            (paths[-1] / "baked.json").write_text(json_text(baked.figures(), indent=1))
        return paths
