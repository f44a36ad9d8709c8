"""The interface of a training method: trainable parameters, loss, checkpoints, exported artifacts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dreamfleet.datasets.config import Concept
from dreamfleet.datasets.errors import RecipeError, UserError
from dreamfleet.datasets.registry import load_attribute
from dreamfleet.trainers.artifacts.kind import ARTIFACTS
from dreamfleet.trainers.config.loss import LossConfig
from dreamfleet.trainers.config.method import METHODS, MethodConfig
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.models.family import COMPONENTS, DiffusionModel
from dreamfleet.trainers.models.formats.optimizer_file import AdamState
from dreamfleet.trainers.optim.param_group import ParamGroup

Batch = dict[str, Any]


class Loss(NamedTuple):
    """Result of ``forward``: the scalar to minimise, the loss per sample ``[N]``, and scalars to log."""

    total: Tensor
    per_sample: Tensor
    extras: dict[str, Tensor]


class Sample(NamedTuple):
    """One image of the index: the data from which a method makes the prompt."""

    id: str
    caption: str | None
    concept: int
    role: str
    uri: str

    @property
    def file_name(self) -> str:
        """Last component of the image's address."""
        return self.uri.rpartition("/")[2]


class Base(NamedTuple):
    """The model or file that training starts from: name, hash of the content, and short description."""

    name: str
    content_hash: str
    words: str


@dataclass(frozen=True)
class Setting:
    """Inputs of a method besides its recipe section: the concepts, and the loss options of ``train:``."""

    concepts: tuple[Concept, ...] = ()
    loss: LossConfig = field(default_factory=LossConfig)


class Method(nn.Module, ABC):
    """A training task: trainable parameters, the loss of a batch, checkpoints and exported artifacts.

    Subclasses implement the abstract methods. ``forward`` must compute the whole loss, because an engine that
    shards parameters gathers them in forward hooks. The model is stored outside the module tree (in a list),
    so that ``parameters()`` has only what is trained, and a wrapper (DDP, DeepSpeed) does not manage frozen
    parts.
    """

    needs: ClassVar[Collection[str]] = COMPONENTS  # components of the model that are loaded
    #: export formats written by default
    formats: tuple[str, ...] = ()
    files_per_format: ClassVar[int] = 1  # files that an export writes in each format that is one file

    def __init__(self, config: Any, model: DiffusionModel, setting: Setting):
        super().__init__()
        model.require_support(config.name)
        self.config, self.setting, self._model = config, setting, [model]
        self.steps_before = 0  # trained steps of the file that the run starts from; saved in checkpoints

    @property
    def name(self) -> str:
        """The method's name in recipes."""
        return str(self.config.name)

    @property
    def all_formats(self) -> tuple[str, ...]:
        """The formats that an export can write: those of the artifact kinds that the recipe section lists."""
        return tuple(form for kind in self.config.artifacts for form in ARTIFACTS.get(kind).formats)

    @property
    def model(self) -> DiffusionModel:
        """The model that is trained or sampled from."""
        return self._model[0]

    @property
    def base(self) -> Base:
        """The model or file that training starts from; by default the model."""
        model = self.model
        words = f"{model.title}, {model.prediction_type}, {model.resolution} px"
        return Base(model.folder, model.content_hash, words)

    @property
    def loss_parts(self) -> dict[str, nn.Module]:
        """The model's parts that gradients pass through, by name; an engine may shard them."""
        return {}

    @property
    def helpers(self) -> dict[str, nn.Module]:
        """Frozen modules besides the model's, by name, stored outside the method's module tree.

        They are moved to devices and counted in memory plans together with the method.
        """
        return {}

    def optimizer(self) -> torch.optim.Optimizer | None:
        """Return the optimizer that the method requires, or None (the default) for that of the recipe."""
        return None

    def start(self) -> dict[str, AdamState]:
        """Load the file that the recipe starts from, if it names one; not called on resume from a checkpoint.

        Returns Adam's moments by parameter name; empty if they are not stored with the file.
        """
        return {}

    @abstractmethod
    def groups(self) -> list[ParamGroup]:
        """Return the trainable parameters by group."""

    @abstractmethod
    def forward(self, batch: Batch) -> Loss:
        """Compute the loss of a batch on the device."""

    def after_step(self) -> None:
        """Change the parameters after an optimizer step, before their average; only the engine torch calls this."""

    def state(self) -> dict[str, Tensor]:
        """Return the trainable parameters by name."""
        return {name: param.detach() for group in self.groups() for name, param in group.params.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load what :meth:`state` returned. Raises RecipeError if names or shapes differ."""
        mine = self.state()
        check_fits(self.name, {name: tensor.shape for name, tensor in mine.items()}, state)
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(state[name])

    def export(self, order: Export) -> list[Path]:
        """Write the artifacts in the requested formats, or in the default ones; return their paths.

        Without requested formats, those of :attr:`formats` that the model supports are written. Raises
        RecipeError for a format that the method or the model does not support.
        """
        self.require_formats(order.formats)
        usual = tuple(form for form in self.formats if form not in self.model.unsupported)
        return self.write(replace(order, formats=order.formats or usual))

    @abstractmethod
    def write(self, order: Export) -> list[Path]:
        """Write the artifacts in ``order.formats`` into ``order.folder``; return their paths."""

    def require_formats(self, formats: Sequence[str]) -> None:
        """Raise RecipeError for an export format that this method or its model does not support."""
        for chosen in formats:
            if chosen not in self.all_formats:
                raise RecipeError(
                    f"{self.name} has no export format {chosen!r}; it has: {', '.join(self.all_formats)}"
                )
            if reason := self.model.unsupported.get(chosen):
                raise RecipeError(f"train.export_formats: {chosen}: {reason}")


def check_fits(method: str, shapes: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> None:
    """Check that a saved state has these names and shapes. Raises RecipeError naming the first that differs."""
    if wrong := sorted(shapes.keys() ^ state.keys()):
        raise RecipeError(
            f"{method}: the parameters of the saved state differ from this recipe's ({', '.join(wrong[:4])})"
        )
    for name, shape in shapes.items():
        if shape != state[name].shape:
            raise RecipeError(
                f"{method}: {name} was saved with shape {list(state[name].shape)}, "
                f"but this recipe makes {list(shape)}"
            )


def method_class(config: MethodConfig | str) -> type[Method]:
    """Return the class of a method, given its name or its recipe section.

    Raises UserError if it is not a subclass of :class:`Method`, or lacks some of its abstract methods.
    """
    section = METHODS.get(config) if isinstance(config, str) else type(config)
    found: type[Method] = load_attribute(section.implementation, what=f"method {section.__name__}")
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(
            f"{section.__name__}.implementation: {section.implementation} is not a subclass of Method"
        )
    if missing := sorted(found.__abstractmethods__):
        raise UserError(f"{section.implementation} does not implement {', '.join(missing)}")
    return found
