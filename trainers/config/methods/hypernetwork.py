"""The ``method:`` section of Hypernetwork."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from dreamfleet.datasets.captions import TEMPLATE_SETS
from dreamfleet.datasets.config_base import split_text
from dreamfleet.datasets.path_field import PathField
from dreamfleet.trainers.config.hypernetwork_structure import (
    Structure,
    WeightInit,
    derived_dropout,
    require_activation,
)
from dreamfleet.trainers.config.method import MethodConfig, SearchSpace

Numbers = Annotated[
    tuple[float, ...], BeforeValidator(split_text)
]  # a list, or text as in the webui: "1, 2, 1"


class HypernetworkConfig(MethodConfig):
    """The options of Hypernetwork."""

    implementation: ClassVar[str] = "dreamfleet.trainers.methods.hypernetwork:HypernetworkMethod"
    summary: ClassVar[str] = (
        "Trains MLPs in front of attention's keys and values; the model is not changed. Megabytes, at any strength."
    )
    artifacts: ClassVar[tuple[str, ...]] = ("hypernetwork",)
    search_spaces: ClassVar[Mapping[str, SearchSpace]] = {
        "hypernetwork": {
            "optimizer.learning_rate": {"distribution": "loguniform", "lower": 1e-6, "upper": 2e-3},
            "method.layer_structure": {"distribution": "choice", "values": ["1, 2, 1", "1, 2, 2, 1"]},
            "method.activation_func": {"distribution": "choice", "values": ["linear", "relu", "swish"]},
        },
    }
    packs: ClassVar[bool] = True

    name: Literal["hypernetwork"] = "hypernetwork"
    enable_sizes: Annotated[tuple[int, ...], BeforeValidator(split_text)] | None = Field(
        None,
        min_length=1,
        description="context widths that get MLPs; default: all of the model's, 320 to 1280 in SD 1.x",
    )
    layer_structure: Numbers = Field(
        (1, 2, 1),
        description='layer widths as multiples of the context width; also as text, "1, 2, 1", as in the webui',
    )
    activation_func: str = Field(
        "linear",
        description="linear, relu, leakyrelu, elu, swish, tanh, sigmoid, or another activation of torch in lower case; "
        "softmax, softmin, logsoftmax and softmax2d mix the images of a batch, as in the webui",
    )
    weight_init: WeightInit = Field(
        "Normal",
        validation_alias=AliasChoices("weight_init", "weight_initialization"),
        description="initial weights of the linear layers; Normal: standard deviation 0.01",
    )
    add_layer_norm: bool = Field(
        False,
        validation_alias=AliasChoices("add_layer_norm", "is_layer_norm"),
        description="layer norm after every layer; its weight is initialised like Normal, as in the webui",
    )
    activate_output: bool = Field(False, description="activation also after the last layer")
    use_dropout: bool = Field(False, description="dropout in the inner layers")
    dropout_structure: Numbers | None = Field(
        None,
        description="dropout rate after each width, the first and the last 0; default: 0.3 between the inner layers",
    )
    multiplier: float = Field(
        1.0,
        gt=0,
        validation_alias=AliasChoices("multiplier", "scale"),
        description="strength in training and previews; generate with the same",
    )
    initial_hypernetwork: Annotated[str | None, PathField("file", is_start=True)] = Field(
        None,
        description="a hypernetwork file to continue from, with the structure of this section; exports continue its "
        "step "
        "count, and a matching webui `.optim` file beside it provides Adam's moments; not read when the run has a "
        "checkpoint",
    )
    template_file: Annotated[str | None, PathField("file", names=TEMPLATE_SETS)] = Field(
        None,
        description="a file with one prompt per line, with [filewords], or a built-in set: hypernetwork, filewords. "
        "Default: the image's caption, else data.instance_prompt",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dropout_structure is not None and not self.use_dropout:
            raise ValueError("dropout_structure needs use_dropout: true")
        if self.dropout_structure and (self.dropout_structure[0] or self.dropout_structure[-1]):
            raise ValueError(
                "dropout_structure must start and end with 0: inputs and outputs are never dropped"
            )
        require_activation(self.activation_func)
        self.structure()
        return self

    @property
    def has_dropout(self) -> bool:
        return any(self.structure().dropout_structure)

    def structure(self) -> Structure:
        """Return the structure of the MLPs. Raises UserError for one that cannot be built."""
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
