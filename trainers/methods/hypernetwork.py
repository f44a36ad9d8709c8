"""Hypernetwork: MLPs on what attention makes its keys and values of learn a look; the model stays as it is.

Source: AUTOMATIC1111's webui, `modules/hypernetworks/hypernetwork.py`, after NovelAI's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from dreamfleet.datasets import captions
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.datasets.index import template_files
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.hypernetwork_structure import (
    Structure,
    WeightInit,
    derived_dropout,
    require_activation,
)
from dreamfleet.trainers.methods.base import Method, MethodConfig, Sample, Setting, register
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.models.formats.hypernetwork import (
    read_hypernetwork,
    write_hypernetwork,
)
from dreamfleet.trainers.models.formats.optimizer_file import AdamState, file_hash, moments_beside
from dreamfleet.trainers.models.stable_diffusion.hypernetwork import (
    Hypernetwork,
    context_widths,
    load_hypernetwork,
    set_hypernetworks,
)
from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion
from dreamfleet.trainers.optim.param_group import ParamGroup


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Numbers = Annotated[tuple[float, ...], BeforeValidator(_split)]  # a list, or the webui's "1, 2, 1"


class HypernetworkConfig(MethodConfig):
    """The ``method:`` section of Hypernetwork."""

    name: Literal["hypernetwork"] = "hypernetwork"
    enable_sizes: Annotated[tuple[int, ...], BeforeValidator(_split)] | None = Field(
        None,
        min_length=1,
        description="widths of the contexts to change; when left out all that the model has, 320 to 1280 in SD 1.x",
    )
    layer_structure: Numbers = Field(
        (1, 2, 1), description='widths of the layers, as multiples; the webui\'s "1, 2, 1" too'
    )
    activation_func: str = Field(
        "linear",
        description="linear, relu, leakyrelu, elu, swish, tanh, sigmoid, or one of torch's, in small letters; softmax, "
        "softmin, logsoftmax and softmax2d mix the pictures of a batch, as in the webui",
    )
    weight_init: WeightInit = Field(
        "Normal",
        validation_alias=AliasChoices("weight_init", "weight_initialization"),
        description="how the linear layers start; Normal: a hundredth of the unit normal",
    )
    add_layer_norm: bool = Field(
        False,
        validation_alias=AliasChoices("add_layer_norm", "is_layer_norm"),
        description="a norm after every layer; its gain starts as Normal does, as in the webui",
    )
    activate_output: bool = Field(False, description="activation after the last layer too")
    use_dropout: bool = Field(False, description="drop parts of the inner layers while training")
    dropout_structure: Numbers | None = Field(
        None,
        description="rate after each of the widths, from 0 to 0; when left out 0.3 between the inner layers",
    )
    multiplier: float = Field(
        1.0,
        gt=0,
        validation_alias=AliasChoices("multiplier", "scale"),
        description="strength it is trained and previewed at; draw with the same",
    )
    initial_hypernetwork: str | None = Field(
        None,
        description="a hypernetwork's file to go on from, built as this section says; its steps count on in what is "
        "exported, and a webui `.optim` beside it that fits brings Adam's moments; not read again once there is a "
        "checkpoint",
    )
    template_file: str | None = Field(
        None,
        description="a prompt a line, with [filewords]; or a set's name: hypernetwork, filewords. When left out, the "
        "picture's caption, else data.instance_prompt",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dropout_structure is not None and not self.use_dropout:
            raise ValueError("dropout_structure needs use_dropout: true; without it nothing is dropped")
        if self.dropout_structure and (self.dropout_structure[0] or self.dropout_structure[-1]):
            raise ValueError("dropout_structure starts and ends with 0: input and output are never dropped")
        require_activation(self.activation_func)
        self.structure()
        return self

    def apply(self, model: StableDiffusion, path: Path) -> None:
        """Make a model draw with an exported file, as this run's previews do."""
        load_hypernetwork(model, path, self.multiplier)

    def structure(self) -> Structure:
        """Return how the MLPs are built. Raises UserError for what nobody can build."""
        num = len(self.layer_structure)
        dropout = derived_dropout(num) if self.use_dropout else (0.0,) * num
        return Structure(
            layer_structure=self.layer_structure,
            activation_func=self.activation_func,
            weight_init=self.weight_init,
            add_layer_norm=self.add_layer_norm,
            activate_output=self.activate_output,
            dropout_structure=self.dropout_structure or dropout,
        )


@register
class HypernetworkMethod(Method):
    """Teach a style: MLPs before attention's keys and values learn, the model stays. Megabytes, any strength."""

    name: ClassVar[str] = "hypernetwork"
    Config = HypernetworkConfig
    formats = ("pt",)
    all_formats = ("pt",)

    def __init__(self, config: HypernetworkConfig, model: StableDiffusion, setting: Setting):
        super().__init__(config, model, setting)
        there = context_widths(model.unet)
        widths = config.enable_sizes or there
        if missing := sorted(set(widths) - set(there)):
            raise RecipeError(
                f"method.enable_sizes: {model.folder} has no contexts of {missing}, only of {there}"
            )
        self.network = Hypernetwork(widths, config.structure())
        set_hypernetworks(model.unet, [(self.network, config.multiplier)])
        self._templates = load_templates(config.template_file)

    def start(self) -> dict[str, AdamState]:
        """Go on from ``initial_hypernetwork``: its weights and steps, and Adam's moments where they lie beside it."""
        if self.config.initial_hypernetwork is None:
            return {}
        self.steps_before, moments = _go_on(self.network, self.config.initial_hypernetwork)
        return moments

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup("hypernetwork", dict(self.network.named_parameters()))]

    def prompt(self, sample: Sample, rng: np.random.Generator, data: Any) -> str:
        """Fill a template line drawn for this use of the picture; without one, its caption or its set's prompt."""
        if not self._templates:
            return super().prompt(sample, rng, data)
        template = captions.choose_template(self._templates, rng)
        return captions.make_caption(
            sample.caption,
            template=template,
            prompt=self.setting.concepts[sample.concept].instance_prompt,
            file_name=sample.file_name,
            rng=rng,
            config=data,
        )

    def export(self, order: Export) -> list[Path]:
        """Write ``NAME.pt``, as the webui does: in full precision, whatever the order says."""
        file = self.network.to_file(
            order.name,
            step=self.steps_before + order.step,
            sd_checkpoint=self.model.short_hash(),
            sd_checkpoint_name=self.model.short_name,
            metadata=order.metadata,
        )
        return [
            write_hypernetwork(file, order.folder / f"{order.name}.{form}")
            for form in self.settled(order).formats
        ]


def _go_on(network: Hypernetwork, path: str) -> tuple[int, dict[str, AdamState]]:
    """Put a file's weights in; returns the steps they were trained, and the moments beside it by parameter.

    Raises RecipeError for one built otherwise.
    """
    with Storage(path).local_copy() as local:
        found, digest = read_hypernetwork(local), file_hash(local)
    theirs, ours = found.structure, network.structure
    told = [
        f"{name}: {getattr(theirs, name)}"
        for name in ("layer_structure", "activation_func", "add_layer_norm", "activate_output")
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if (widths := sorted(found.weights)) != network.widths:
        told.append(f"enable_sizes: {widths}")
    if told:
        raise RecipeError(
            f"method.initial_hypernetwork: {path} is built otherwise than this run's; set " + ", ".join(told)
        )
    network.load_state_dict(Hypernetwork.from_file(found).state_dict())
    ours_named = dict(network.named_parameters())
    # The webui's optimizer has them in the order of the file.
    names = [name for width in found.weights for name in ours_named if name.startswith(f"layers.{width}.")]
    moments = moments_beside(path, fits=digest, shapes=[list(ours_named[name].shape) for name in names])
    return found.step, dict(zip(names, moments, strict=True)) if moments else {}


def load_templates(name: str | None) -> tuple[str, ...]:
    """Return the prompt templates of a set or a file, none without a name.

    Raises RecipeError for one with ``[name]``: a hypernetwork has no word of its own.
    """
    if name is None:
        return ()
    templates = template_files.load_templates(name)
    if asking := [template for template in templates if "[name]" in template]:
        raise RecipeError(
            f"method.template_file {name}: {asking[0]!r} asks for the name of what is learnt, and a hypernetwork has "
            "no word of its own; use [filewords], or the set hypernetwork"
        )
    return templates
