"""The structure of a hypernetwork's MLPs: layer widths, activation, initialisation, dropout. Does not import torch.

Source of names and defaults: AUTOMATIC1111's webui, `modules/hypernetworks/hypernetwork.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dreamfleet.datasets.errors import UserError

WeightInit = Literal["Normal", "XavierUniform", "XavierNormal", "KaimingUniform", "KaimingNormal"]
# The webui's name of an activation -> its class in torch.nn. The webui also lists glu, multiheadattention and
# threshold, which cannot be used between two layers.
ACTIVATIONS = {
    "linear": "Identity",
    "relu": "ReLU",
    "leakyrelu": "LeakyReLU",
    "elu": "ELU",
    "swish": "Hardswish",  # the webui's name for it
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
}
BATCH_ACTIVATIONS = ("softmax", "softmin", "logsoftmax", "softmax2d")  # along the batch, as in the webui
MAX_LAYERS = (
    32  # also the largest multiple of a width; both limit the memory that an untrusted file can allocate
)
DERIVED_DROPOUT = 0.3


@dataclass(frozen=True)
class Structure:
    """The structure that all MLPs of a hypernetwork share.

    ``layer_structure``: widths as multiples of the context's width, from 1 to 1. ``dropout_structure``: the dropout
    rate after each of these widths; the first is never used. Raises UserError for values that cannot be built.
    """

    layer_structure: tuple[float, ...] = (1, 2, 1)
    activation_func: str = "linear"
    weight_init: WeightInit = "Normal"
    add_layer_norm: bool = False
    activate_output: bool = False
    dropout_structure: tuple[float, ...] = (0, 0, 0)

    def __post_init__(self) -> None:
        layers, dropout = self.layer_structure, self.dropout_structure
        fits = 2 <= len(layers) <= MAX_LAYERS and all(0 < factor <= MAX_LAYERS for factor in layers)
        if not fits or layers[0] != 1 or layers[-1] != 1:
            raise UserError(
                f"layer_structure {list(layers)[:MAX_LAYERS]}: give 2 to {MAX_LAYERS} multiples of the width, the "
                "first and the last 1, such as 1, 2, 1"
            )
        # With a single layer no activation is used, so the webui accepts files with any name of an activation.
        if len(layers) > 2 or self.activate_output:
            require_activation(self.activation_func)
        if self.weight_init not in get_args(WeightInit):
            raise UserError(
                f"weight_init {self.weight_init!r}: choose from {', '.join(get_args(WeightInit))}"
            )
        if len(dropout) != len(layers) or not all(0 <= rate < 1 for rate in dropout):
            raise UserError(
                f"dropout_structure {list(dropout)[:MAX_LAYERS]}: give a rate in [0, 1) for each of the {len(layers)} "
                "entries of layer_structure, such as 0, 0.3, 0"
            )

    def sizes(self, width: int) -> list[int]:
        """Return the layer widths for contexts of ``width``. Raises UserError where one rounds to 0."""
        sizes = [int(width * factor) for factor in self.layer_structure]
        if min(sizes) < 1:
            raise UserError(f"layer_structure {list(self.layer_structure)}: width {width} shrinks to 0")
        return sizes

    def is_activated(self, number: int) -> bool:
        """Return whether an activation follows linear layer ``number``, counted from 1."""
        inner = number < len(self.layer_structure) - 1
        return self.activation_func != "linear" and (inner or self.activate_output)


def require_activation(name: str) -> None:
    """Raise UserError for an activation that no MLP can have."""
    if name not in ACTIVATIONS:
        raise UserError(f"activation_func {name!r}: choose from {', '.join(ACTIVATIONS)}")


def derived_dropout(num_entries: int, *, last_layer: bool = False) -> tuple[float, ...]:
    """Return the webui's dropout structure for files and recipes that only specify "use dropout"."""
    inner = [DERIVED_DROPOUT] * max(0, num_entries - 3)
    return (0, *inner, DERIVED_DROPOUT if last_layer else 0, 0)[:num_entries]
