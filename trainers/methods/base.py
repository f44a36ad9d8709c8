"""What a fine-tuning method is: what learns, its loss, and what comes out; and the registry that finds them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dreamfleet.datasets import captions
from dreamfleet.datasets.config import Concept
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.registry import load_attribute
from dreamfleet.trainers.artifacts.kind import ARTIFACTS
from dreamfleet.trainers.config.method import METHODS, MethodConfig
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.methods.fits import check_fits
from dreamfleet.trainers.models.condition import Condition
from dreamfleet.trainers.models.family import COMPONENTS, DiffusionModel
from dreamfleet.trainers.models.formats.optimizer_file import AdamState
from dreamfleet.trainers.optim.param_group import ParamGroup

Batch = dict[str, Any]


class Loss(NamedTuple):
    """What ``forward`` returns: the scalar to minimise, the loss of each sample ``[N]``, and named extras to log."""

    total: Tensor
    per_sample: Tensor
    extras: dict[str, Tensor]


class Sample(NamedTuple):
    """One picture of the index, as a method sees it when it chooses the prompt."""

    id: str
    caption: str | None
    concept: int
    role: str
    uri: str

    @property
    def file_name(self) -> str:
        """The last part of the picture's address."""
        return self.uri.rpartition("/")[2]


class Base(NamedTuple):
    """What a method starts from: its name, a hash of its content, and a few words on it."""

    name: str
    content_hash: str
    words: str


@dataclass(frozen=True)
class Prior:
    """Prior preservation: how many class pictures a concept needs, how they are drawn, what their loss weighs."""

    num_class_images: int
    loss_weight: float
    steps: int
    guidance_scale: float
    batch_size: int


@dataclass(frozen=True)
class Setting:
    """What a method is told besides its own section: the concepts, and the loss options of ``train:``."""

    concepts: tuple[Concept, ...] = ()
    snr_gamma: float | None = None


class Method(nn.Module):
    """One way to fine-tune Stable Diffusion.

    ``forward(batch)`` must compute the loss inside itself: an engine that shards parameters gathers them
    in forward hooks.
    The base models hang outside the module tree (in a plain list), so ``parameters()`` is what learns and a wrapper
    (DDP, DeepSpeed) never touches frozen parts.
    """

    needs: ClassVar[Collection[str]] = COMPONENTS
    #: the formats that an export writes by default
    formats: tuple[str, ...] = ()

    def __init__(self, config: Any, model: DiffusionModel, setting: Setting):
        super().__init__()
        model.require_support(config.name)
        self.config, self.setting, self._model = config, setting, [model]
        self.steps_before = 0  # that what the run goes on from was trained; checkpoints keep it

    @property
    def name(self) -> str:
        """The method's name in recipes."""
        return str(self.config.name)

    @property
    def all_formats(self) -> tuple[str, ...]:
        """The formats that an export can write: those of the artifact kinds that the recipe section names."""
        return tuple(form for kind in self.config.artifacts for form in ARTIFACTS.get(kind).formats)

    @property
    def model(self) -> DiffusionModel:
        """The Stable Diffusion being fine-tuned."""
        return self._model[0]

    @property
    def trains_text(self) -> bool:
        """Whether the text side learns, so that prompts must be encoded anew in every step."""
        return False

    @property
    def loss_parts(self) -> dict[str, nn.Module]:
        """The model's parts that gradients pass through, learning or not, by name: what a sharding engine shards."""
        return self.model.trainable_parts(text=self.trains_text)

    @property
    def prior(self) -> Prior | None:
        """How the class pictures of prior preservation are made and weighed; None for methods without it."""
        return None

    @property
    def base(self) -> Base:
        """What it starts from: the model."""
        model = self.model
        words = f"{model.title}, {model.prediction_type}, {model.resolution} px"
        return Base(model.folder, model.content_hash, words)

    @property
    def helpers(self) -> dict[str, nn.Module]:
        """Frozen modules besides the model's, by name: outside the module tree, but moved and counted with it."""
        return {}

    def optimizer(self) -> torch.optim.Optimizer | None:
        """Make the optimizer of a method whose steps are no descent; None, as usual: the recipe's."""
        return None

    def start(self) -> dict[str, AdamState]:
        """Put in what the recipe goes on from besides the model; not called where a checkpoint is loaded.

        Returns Adam's memory of what learns, by name, where that came along.
        """
        return {}

    def groups(self) -> list[ParamGroup]:
        """Return the learning parameters by group, each with what scales its learning rate."""
        raise NotImplementedError

    def prompt(self, sample: Sample, rng: np.random.Generator, data: Any) -> str:
        """Choose the prompt a sample is trained with; ``rng`` is keyed by (seed, epoch, sample id).

        The default is the image's caption, else its set's prompt.
        """
        return captions.make_caption(
            sample.caption,
            prompt=self.setting.concepts[sample.concept].instance_prompt,
            file_name=sample.file_name,
            rng=rng,
            config=data,
        )

    def check_prompts(self, samples: Sequence[Sample], data: Any) -> str | None:
        """Return what to warn of in a run's prompts. Raises RecipeError where nothing could be learned from them."""
        for prompt in (concept.instance_prompt for concept in self.setting.concepts):
            if prompt and ("[name]" in prompt or "{}" in prompt):
                raise RecipeError(
                    f"data.instance_prompt: {prompt!r} has a place for the name of what is learned, and {self.name} "
                    "learns no word; write the words themselves, as in 'a photo of sks cat'"
                )
        return None

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Turn prompts into ids ``[B, T]``, 77 a chunk; ``[B, 2, T]`` for SDXL's two text encoders."""
        return self.model.tokenize(prompts)

    def encode(self, prompts: Sequence[str], ids: Tensor | None = None) -> Condition:
        """Encode texts as this method's artefact makes them read; literal ones where their ids are not given."""
        return self.model.encode(prompts) if ids is None else self.model.encode_tokens(ids)

    def forward(self, batch: Batch) -> Loss:
        """Compute the loss of a batch; the default is the noise loss weighted per sample (see ``batch_loss``)."""
        return self.batch_loss(batch)

    def sample_losses(self, batch: Batch, *, snr_gamma: float | None = None) -> Tensor:
        """Compute the noise loss of each sample ``[N]``: what training lowers, and what held-out pictures measure."""
        return self.model.denoising_loss(batch, snr_gamma=snr_gamma)

    def batch_loss(self, batch: Batch) -> Loss:
        """Weigh the noise loss: ``sum(weights * loss) / num_instances``.

        With class pictures in the batch that is mean(instance) + prior_loss_weight * mean(class), the
        DreamBooth paper's equation 2, right for any batch size. min-SNR weights, when on, apply to both halves.
        """
        per_sample = self.sample_losses(batch, snr_gamma=self.setting.snr_gamma)
        count = batch["num_instances"]
        total = (per_sample * batch["weights"]).sum() / count
        extras = {}
        if len(per_sample) > count:
            extras = {
                "instance_loss": per_sample[:count].detach().mean(),
                "prior_loss": per_sample[count:].detach().mean(),
            }
        return Loss(total, per_sample.detach(), extras)

    def after_step(self, step: int) -> None:
        """Run after each optimizer step; most methods need nothing here."""

    def state(self) -> dict[str, Tensor]:
        """Return exactly what learns, by name."""
        return {name: param.detach() for group in self.groups() for name, param in group.params.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put back what :meth:`state` gave. Raises RecipeError when names or shapes differ."""
        mine = self.state()
        check_fits(self.name, {name: tensor.shape for name, tensor in mine.items()}, state)
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(state[name])

    def export(self, order: Export) -> list[Path]:
        """Write the artefacts other programs read; returns the paths written."""
        raise NotImplementedError

    def settled(self, order: Export) -> Export:
        """Return the order with the formats to write; by default those that the model supports.

        Raises RecipeError for a format that the method or the model does not have.
        """
        self.require_formats(order.formats)
        usual = tuple(form for form in self.formats if form not in self.model.unsupported)
        return replace(order, formats=order.formats or usual)

    def require_formats(self, formats: Sequence[str]) -> None:
        """Raise RecipeError for an export format this method does not have."""
        for chosen in formats:
            if chosen not in self.all_formats:
                raise RecipeError(
                    f"{self.name} has no export format {chosen!r}; it has: {', '.join(self.all_formats)}"
                )
            if reason := self.model.unsupported.get(chosen):
                raise RecipeError(f"train.export_formats: {chosen}: {reason}")


def method_class(config: MethodConfig | str) -> type[Method]:
    """Return the class of a method, given its name or its recipe section."""
    section = METHODS.get(config) if isinstance(config, str) else type(config)
    found: type[Method] = load_attribute(section.implementation, what=f"method {section.__name__}")
    return found
