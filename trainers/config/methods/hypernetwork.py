"""The ``method:`` section of hypernetwork."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from dreamfleet.datasets.captions import TEMPLATE_SETS
from dreamfleet.datasets.path_field import PathField
from dreamfleet.trainers.config.hypernetwork_structure import (
    Structure,
    WeightInit,
    derived_dropout,
    require_activation,
)
from dreamfleet.trainers.config.method import MethodConfig


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Numbers = Annotated[tuple[float, ...], BeforeValidator(_split)]  # a list, or the webui's "1, 2, 1"


class HypernetworkConfig(MethodConfig):
    """The ``method:`` section of Hypernetwork."""

    implementation: ClassVar[str] = "dreamfleet.trainers.methods.hypernetwork:HypernetworkMethod"
    summary: ClassVar[str] = (
        "Teach a style: MLPs before attention's keys and values learn, the model stays. Megabytes, any strength."
    )
    artifacts: ClassVar[tuple[str, ...]] = ("hypernetwork",)

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
    initial_hypernetwork: Annotated[str | None, PathField("file", is_start=True)] = Field(
        None,
        description="a hypernetwork's file to go on from, built as this section says; its steps count on in what is "
        "exported, and a webui `.optim` beside it that fits brings Adam's moments; not read again once there is a "
        "checkpoint",
    )
    template_file: Annotated[str | None, PathField("file", names=TEMPLATE_SETS)] = Field(
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
