"""How the MLPs of a hypernetwork are built, and what of it can be built.

Source: AUTOMATIC1111's webui, `modules/hypernetworks/hypernetwork.py`, whose names these are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dreamfleet.datasets.errors import UserError

WeightInit = Literal["Normal", "XavierUniform", "XavierNormal", "KaimingUniform", "KaimingNormal"]
# An activation's name, the webui's, and its class in torch.nn.
ACTIVATIONS = {
    "linear": "Identity",
    "relu": "ReLU",
    "leakyrelu": "LeakyReLU",
    "elu": "ELU",
    "swish": "Hardswish",  # the webui calls it swish
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "celu": "CELU",
    "gelu": "GELU",
    "hardshrink": "Hardshrink",
    "hardsigmoid": "Hardsigmoid",
    "hardswish": "Hardswish",
    "hardtanh": "Hardtanh",
    "logsigmoid": "LogSigmoid",
    "mish": "Mish",
    "prelu": "PReLU",
    "relu6": "ReLU6",
    "rrelu": "RReLU",
    "selu": "SELU",
    "silu": "SiLU",
    "softplus": "Softplus",
    "softshrink": "Softshrink",
    "softsign": "Softsign",
    "tanhshrink": "Tanhshrink",
    "softmax": "Softmax",
    "softmin": "Softmin",
    "logsoftmax": "LogSoftmax",
    "softmax2d": "Softmax2d",
}  # The webui also lists glu, multiheadattention and threshold, which cannot run between two layers.
MOST_LAYERS = 32  # and the largest multiplier of a width: bounds on what a stranger's file makes us build
DERIVED_DROPOUT = 0.3


@dataclass(frozen=True)
class Structure:
    """How every MLP of a hypernetwork is built.

    ``layer_structure``: widths as multiples of the context's, from 1 to 1. ``dropout_structure``: the rate after each
    of these widths; the first is never used. Raises UserError for what nobody can build.
    """

    layer_structure: tuple[float, ...] = (1, 2, 1)
    activation_func: str = "linear"
    weight_init: WeightInit = "Normal"
    add_layer_norm: bool = False
    activate_output: bool = False
    dropout_structure: tuple[float, ...] = (0, 0, 0)

    def __post_init__(self) -> None:
        layers, dropout = self.layer_structure, self.dropout_structure
        fits = 2 <= len(layers) <= MOST_LAYERS and all(0 < factor <= MOST_LAYERS for factor in layers)
        if not fits or layers[0] != 1 or layers[-1] != 1:
            raise UserError(
                f"layer_structure {list(layers)[:MOST_LAYERS]}: give 2 to {MOST_LAYERS} multiples of the width, the "
                "first and the last 1, such as 1, 2, 1"
            )
        if (
            len(layers) > 2 or self.activate_output
        ):  # else there is none, whatever the name: so the webui reads files
            require_activation(self.activation_func)
        if self.weight_init not in get_args(WeightInit):
            raise UserError(
                f"weight_init {self.weight_init!r}: choose from {', '.join(get_args(WeightInit))}"
            )
        if len(dropout) != len(layers) or not all(0 <= rate < 1 for rate in dropout):
            raise UserError(
                f"dropout_structure {list(dropout)[:MOST_LAYERS]}: give a rate in [0, 1) for each of the {len(layers)} "
                "entries of layer_structure, such as 0, 0.3, 0"
            )


def require_activation(name: str) -> None:
    """Raise UserError for an activation that no MLP can have."""
    if name not in ACTIVATIONS:
        raise UserError(f"activation_func {name!r}: choose from {', '.join(ACTIVATIONS)}")


def derived_dropout(num_entries: int, *, last_layer: bool = False) -> tuple[float, ...]:
    """Return the drop-out structure that the webui makes up where only "use dropout" was said."""
    inner = [DERIVED_DROPOUT] * max(0, num_entries - 3)
    return (0, *inner, DERIVED_DROPOUT if last_layer else 0, 0)[:num_entries]
