"""The base class of methods that train a diffusion model on latents, noise and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from dreamfleet.datasets import captions
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.methods.base import Batch, Loss, Method, Sample, Setting
from dreamfleet.trainers.models.condition import Condition
from dreamfleet.trainers.models.denoising_loss import check_loss
from dreamfleet.trainers.models.family import DiffusionModel


@dataclass(frozen=True)
class Prior:
    """Options of prior preservation: class images per concept, their generation, weight of their loss."""

    num_class_images: int
    loss_weight: float
    steps: int
    guidance_scale: float
    batch_size: int


class DenoiserInputs(NamedTuple):
    """The arguments of :meth:`DiffusionModel.predict`: ``noisy [R, C, H, W]``, ``timesteps [R]`` and the condition."""

    noisy: Tensor
    timesteps: Tensor
    condition: Condition


class DiffusionMethod(Method):
    """A method whose loss is the error of the denoiser's prediction.

    A batch on the device has ``latents, noise [N, C, H, W]``, ``timesteps [N]``, ``weights [N]``,
    ``num_instances`` (class images come after the instances), and either ``input_ids`` (with
    :attr:`trains_text`) or the entries of the encoded prompts. By default an image is trained with its
    caption, or else with the instance prompt of its concept.

    A step is a composition of :meth:`text_ids`, the text encoders, :meth:`denoiser_inputs`, the denoiser, and
    :meth:`loss`. So trainings that share a model can share one pass of its text encoders and of its denoiser
    (``trainers.packing``). A method that replaces :meth:`forward` or :meth:`sample_losses` cannot be packed.
    """

    def __init__(self, config: Any, model: DiffusionModel, setting: Setting):
        super().__init__(config, model, setting)
        check_loss(model, setting.loss)

    @property
    def trains_text(self) -> bool:
        """Whether the text encoder or its input is trained, so that prompts must be encoded in every step."""
        return False

    @property
    def prior(self) -> Prior | None:
        """Options of prior preservation; None if the method does not use it."""
        return None

    @property
    def loss_parts(self) -> dict[str, nn.Module]:
        return self.model.trainable_parts(text=self.trains_text)

    def prompt(self, sample: Sample, rng: np.random.Generator, data: DataConfig) -> str:
        """Return the prompt that a sample is trained with; ``rng`` is keyed by (seed, epoch, sample id)."""
        return captions.make_caption(
            sample.caption,
            prompt=self.setting.concepts[sample.concept].instance_prompt,
            file_name=sample.file_name,
            rng=rng,
            config=data,
        )

    def options_of(self, sample: Sample, data: DataConfig) -> DataConfig:
        """Return the options of a sample's captions: those of ``data``, except what its set overrides."""
        concepts = self.setting.concepts
        return data.for_set(concepts[sample.concept]) if sample.concept < len(concepts) else data

    def check_prompts(self, samples: Sequence[Sample], data: DataConfig) -> str | None:
        """Return a warning about a run's prompts, or None. Raises RecipeError if nothing can be learned."""
        for prompt in (concept.instance_prompt for concept in self.setting.concepts):
            if prompt and ("[name]" in prompt or "{}" in prompt):
                raise RecipeError(
                    f"data.instance_prompt: {prompt!r} has a placeholder for a name, but {self.name} trains no "
                    "placeholder token; "
                    "write a prompt without it, such as 'a photo of sks cat'"
                )
        return None

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return the token ids of prompts ``[B, T]``, 77 per chunk; ``[B, 2, T]`` for two text encoders."""
        return self.model.tokenize(prompts)

    def encode(self, prompts: Sequence[str], ids: Tensor | None = None) -> Condition:
        """Encode prompts as sampling with the exported artifact does.

        ``ids``: token ids of the prompts, see :meth:`tokenize`; None: the prompts are literal text.
        """
        return self.model.encode(prompts) if ids is None else self.model.encode_tokens(ids)

    def text_ids(self, batch: Batch) -> Tensor | None:
        """Return the token ids ``[R, ..., T]`` that a step encodes; None if the batch has encoded prompts."""
        return batch.get("input_ids")

    def denoiser_inputs(self, batch: Batch, encoded: Condition | None) -> DenoiserInputs:
        """Return the denoiser's inputs for a batch; ``encoded``: the encoded :meth:`text_ids`."""
        timesteps = batch["timesteps"]
        if encoded is None:
            condition = Condition.in_batch(batch)
        else:
            condition = encoded.with_sizes(batch["time_ids"]) if self.model.uses_time_ids else encoded
        return DenoiserInputs(self.noised(batch), timesteps, condition)

    def noised(self, batch: Batch) -> Tensor:
        """Return the noised latents ``[N, C, H, W]``, the denoiser's input.

        A batch may have ``input_noise``: noise that replaces ``noise`` here but not in the target.
        """
        noise = batch["input_noise"] if "input_noise" in batch else batch["noise"]
        return self.model.add_noise(batch["latents"], noise, batch["timesteps"])

    def combine(self, batch: Batch, predicted: Tensor) -> Tensor:
        """Return the prediction of each sample ``[N, C, H, W]`` from the denoiser's output ``[R, C, H, W]``."""
        return predicted

    def predict(self, batch: Batch) -> tuple[DenoiserInputs, Tensor]:
        """Return a batch's denoiser inputs and the denoiser's output ``[R, C, H, W]``."""
        ids = self.text_ids(batch)
        inputs = self.denoiser_inputs(batch, None if ids is None else self.model.encode_tokens(ids))
        return inputs, self.model.predict(*inputs)

    def sample_losses(self, batch: Batch) -> Tensor:
        """Return the mean squared error of each sample ``[N]``, for held-out images, whatever the recipe's loss."""
        return self.errors(batch, self.predict(batch)[1])

    def errors(self, batch: Batch, predicted: Tensor) -> Tensor:
        """Return the mean squared error of each sample ``[N]``, given the denoiser's output ``[R, C, H, W]``."""
        return self.model.loss(self.combine(batch, predicted), batch)

    def forward(self, batch: Batch) -> Loss:
        """Return the loss of a batch, see :meth:`loss`."""
        return self.loss(batch, *self.predict(batch))

    def loss(self, batch: Batch, inputs: DenoiserInputs, predicted: Tensor) -> Loss:
        """Return the weighted denoising loss: ``sum(weights * loss) / num_instances``.

        ``predicted``: the denoiser's output for ``inputs``. With class images in the batch, this is mean(instance) +
        prior_loss_weight * mean(class), equation 2 of the DreamBooth paper (arXiv 2208.12242), for every batch size.
        The recipe's loss type and weights apply to both halves.
        """
        per_sample = self.model.loss(self.combine(batch, predicted), batch, self.setting.loss)
        count = batch["num_instances"]
        total = (per_sample * batch["weights"]).sum() / count
        extras = {}
        if len(per_sample) > count:
            extras = {
                "instance_loss": per_sample[:count].detach().mean(),
                "prior_loss": per_sample[count:].detach().mean(),
            }
        return Loss(total, per_sample.detach(), extras)


def require_diffusion(method: Method, key: str) -> DiffusionMethod:
    """Return the method if it is a DiffusionMethod. Raises RecipeError naming ``key``, which needs one."""
    if not isinstance(method, DiffusionMethod):
        raise RecipeError(
            f"{key} needs a method that trains a diffusion model, which {method.name} does not; leave it out"
        )
    return method
