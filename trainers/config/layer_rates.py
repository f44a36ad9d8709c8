"""The keys of a method that trains the model's layers: learning rates by block and layer, and frozen layers."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from dreamfleet.datasets.config_base import Section, split_text

_CURVE = re.compile(r"^(cosine|sine|linear|reverse_linear|zeros)(?:\+(\d+(?:\.\d+)?))?$")


def _read_numbers(value: Any) -> Any:
    """Return kohya's text ``0,0,1`` as numbers, where an empty place is 0; other values unchanged."""
    if not isinstance(value, str) or _CURVE.fullmatch(value):
        return value
    try:
        parts = [float(part) if part.strip() else 0.0 for part in value.split(",")]
    except ValueError:
        raise ValueError(
            f"{value!r}: give numbers, or a curve: cosine, sine, linear, reverse_linear, zeros"
        ) from None
    return parts[0] if len(parts) == 1 else parts


_Factor = Annotated[float, Field(ge=0)]
_Factors = Annotated[_Factor | Annotated[list[_Factor], Field(min_length=1)], BeforeValidator(_read_numbers)]
_FactorsOrCurve = Annotated[
    _Factor | Annotated[list[_Factor], Field(min_length=1)] | Annotated[str, Field(pattern=_CURVE.pattern)],
    BeforeValidator(_read_numbers),
]


class LayerRates(Section):
    """Learning rates by block and layer of the model, and layers that are not trained; a factor of 0 freezes."""

    down_lr_weight: _FactorsOrCurve | None = Field(
        None,
        description="factor of the learning rate in the U-Net's first half: a number, one for each input block (12; "
        "SDXL: 9), or kohya's curve such as `sine+0.25`",
    )
    mid_lr_weight: _Factors | None = Field(
        None, description="factor of the learning rate in the U-Net's middle: a number; SDXL: also three"
    )
    up_lr_weight: _FactorsOrCurve | None = Field(
        None, description="as down_lr_weight, in the U-Net's second half (12 output blocks; SDXL: 9)"
    )
    block_lr: Annotated[list[_Factor] | None, BeforeValidator(_read_numbers)] = Field(
        None,
        description="learning rates of the U-Net's blocks instead of factors: embeddings, input blocks, middle, output "
        "blocks, output layer (27; SDXL: 23)",
    )
    lr_factors: dict[str, _Factor] = Field(
        {},
        description="factor of the learning rate by layer: `{'*.attn2.*': 0.5, unet.down_blocks.0: 0.1}`; a pattern "
        "covers also what is inside of a layer, and the last one that matches counts",
    )
    freeze_layers: Annotated[tuple[str, ...], BeforeValidator(split_text)] = Field(
        (), description="layers that are not trained, as patterns: `unet.up_blocks.3, text_encoder.*.mlp.*`"
    )
    loraplus_lr_ratio: float | None = Field(
        None,
        gt=0,
        description="LoRA+ (Hayou et al. 2024): factor of the learning rate of a LoRA's `up` matrices, 16 in the paper",
    )
    loraplus_unet_lr_ratio: float | None = Field(
        None, gt=0, description="loraplus_lr_ratio of the U-Net; default: loraplus_lr_ratio"
    )
    loraplus_text_encoder_lr_ratio: float | None = Field(
        None, gt=0, description="loraplus_lr_ratio of the text encoders; default: loraplus_lr_ratio"
    )


def expand_factors(value: float | list[float] | str | None, count: int) -> list[float] | None:
    """Return ``count`` factors from a number, a list or a curve of kohya's; None if a list has another length.

    Source of the curves: kohya-ss/sd-scripts, ``networks/lora.py:get_block_lr_weight``.
    """
    if value is None:
        return [1.0] * count
    if isinstance(value, list):
        return value if len(value) == count else None
    if isinstance(value, float | int):
        return [float(value)] * count
    match = _CURVE.fullmatch(value)
    assert match is not None
    shares = [i / max(1, count - 1) for i in range(count)]
    curve = {
        "sine": lambda share: math.sin(math.pi / 2 * share),
        "cosine": lambda share: math.sin(math.pi / 2 * (1 - share)),
        "linear": lambda share: share,
        "reverse_linear": lambda share: 1 - share,
        "zeros": lambda share: 0.0,
    }[match[1]]
    return [curve(share) + float(match[2] or 0) for share in shares]
