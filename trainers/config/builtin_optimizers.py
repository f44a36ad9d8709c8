"""The optimizers of this project: their options and the bytes of their states."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from dreamfleet.trainers.config.optimizers import Beta, Optimizer, OptimizerOptions, Pair, Shape

# bitsandbytes keeps tensors below SMALL_8BIT elements in float32; 8-bit states have a scale per BLOCK_8BIT elements.
SMALL_8BIT, BLOCK_8BIT = 4096, 256
#: Schedule-Free's average does not exist for a beta 1 of 0.
FreePair = tuple[Annotated[float, Field(gt=0, lt=1)], Beta]
_MODULE = "dreamfleet.trainers.optim."


class AdamOptions(OptimizerOptions):
    """Options of AdamW and of its relatives."""

    shared: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "weight_decay": ("adam_weight_decay",),
        "betas": ("adam_beta1", "adam_beta2"),
        "eps": ("adam_epsilon",),
    }
    betas: Pair | None = Field(None, description="default: `adam_beta1` and `adam_beta2`")
    eps: float | None = Field(None, gt=0, description="default: `adam_epsilon`")


class LionOptions(OptimizerOptions):
    """Options of Lion."""

    betas: Pair = Field((0.9, 0.99), description="decay of the update's interpolation and of the momentum")


class AdafactorOptions(OptimizerOptions):
    """Options of Adafactor; the recipe's learning rate takes the place of the relative one."""

    relative_step: Literal[False] = Field(
        False, description="learning rates come from the recipe: only `false`"
    )
    scale_parameter: Literal[False] = Field(False, description="only `false`, for the same reason")
    warmup_init: Literal[False] = Field(False, description="only `false`, for the same reason")


class CameOptions(OptimizerOptions):
    """Options of CAME."""

    betas: tuple[Beta, Beta, Beta] = Field(
        (0.9, 0.999, 0.9999), description="decay of momentum, squared gradients and squared deviations"
    )
    eps: tuple[float, float] = Field(
        (1e-30, 1e-16), description="added to squared gradients and to squared deviations"
    )
    clip_threshold: float = Field(1.0, gt=0, description="maximum root mean square of an update")


class ScheduleFreeOptions(AdamOptions):
    """Options of the package schedulefree's AdamW."""

    betas: FreePair | None = Field(None, description="default: `adam_beta1` and `adam_beta2`")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up, besides the recipe's schedule")
    r: float = Field(0.0, ge=0, description="power of the step number in the average's weights")
    weight_lr_power: float = Field(
        2.0, ge=0, description="power of the learning rate in the average's weights"
    )


class ProdigyOptions(AdamOptions):
    """Options of the package prodigyopt."""

    beta3: float | None = Field(
        None, ge=0, lt=1, description="decay of the estimate; default: root of beta 2"
    )
    decouple: bool = Field(True, description="weight decay as in AdamW, not as an L2 penalty")
    use_bias_correction: bool = Field(False, description="Adam's bias correction")
    safeguard_warmup: bool = Field(
        False, description="keep a warm-up of the rate out of the estimate's denominator"
    )
    d0: float = Field(1e-6, gt=0, description="first estimate of d")
    d_coef: float = Field(1.0, gt=0, description="factor of the estimate; the way to tune Prodigy")
    growth_rate: float | None = Field(None, gt=1, description="largest factor by which d grows in a step")
    slice_p: int = Field(
        1, ge=1, description="estimate from every p-th weight; 11 saves nearly half the states"
    )
    split_groups: bool | None = Field(
        None,
        description="an estimate for each part of the model; default: only where their learning rates differ",
    )

    def with_rates(self, rates: Mapping[str, Any]) -> ProdigyOptions:
        if self.split_groups is not None:
            return self
        return self.model_copy(update={"split_groups": len(set(rates.values())) > 1})


class ProdigyFreeOptions(OptimizerOptions):
    """Options of the package prodigy-plus-schedule-free."""

    betas: FreePair = Field(
        (0.9, 0.99), description="interpolation of the average, decay of squared gradients"
    )
    beta3: float | None = Field(
        None, ge=0, lt=1, description="decay of the estimate; default: root of beta 2"
    )
    eps: float | None = Field(1e-8, gt=0, description="null: atan2 in place of the division")
    d0: float = Field(1e-6, gt=0, description="first estimate of d")
    d_coef: float = Field(1.0, gt=0, description="factor of the estimate")
    d_limiter: bool = Field(True, description="d grows by at most a factor of 1.19 in a step")
    prodigy_steps: int = Field(0, ge=0, description="keep d from this step on and free its states; 0: never")
    schedulefree_c: float = Field(0.0, ge=0, description="length of the average; 0: that of the paper")
    split_groups: bool = Field(True, description="an estimate for each part of the model")
    split_groups_mean: bool = Field(False, description="use the harmonic mean of these estimates")
    factored: bool = Field(True, description="row and column means of squared gradients, as in Adafactor")
    use_bias_correction: bool = Field(False, description="RAdam's warm-up; d grows more slowly")
    use_stableadamw: bool = Field(True, description="clip the root mean square of an update to 1")
    use_speed: bool = Field(False, description="another estimate of d, with fewer states")
    weight_decay_by_lr: bool = Field(True, description="multiply the weight decay by the learning rate")
    use_schedulefree: Literal[True] = Field(True, description="only `true`; without it, use prodigy")
    stochastic_rounding: Annotated[bool, BeforeValidator(bool)] = Field(
        True, description="ignored: `train.full_bf16` always rounds stochastically"
    )


def _count(shape: Shape) -> int:
    return math.prod(shape)


def _factors(shape: Shape) -> int:
    """Return the number of row and column means of a weight as a matrix ``[first, rest]``; of a vector, its size."""
    return shape[0] + _count(shape) // max(1, shape[0]) if len(shape) > 1 else _count(shape)


def _quantized(moments: int) -> Any:
    """Return the function that counts the bytes of 8-bit states."""

    def count(shape: Shape, options: Any) -> int:
        numel = _count(shape)
        if numel < SMALL_8BIT:
            return 4 * moments * numel
        return moments * (numel + 4 * -(-numel // BLOCK_8BIT))

    return count


def _came_bytes(shape: Shape, options: CameOptions) -> int:
    return 4 * (_count(shape) + (2 if len(shape) > 1 else 1) * _factors(shape))


def _prodigy_bytes(shape: Shape, options: ProdigyOptions) -> int:
    return 8 * _count(shape) + 8 * -(-_count(shape) // options.slice_p)


def _prodigy_free_bytes(shape: Shape, options: ProdigyFreeOptions) -> int:
    numel, sides = _count(shape), sorted(shape)[-2:]
    squares = numel
    if options.factored and len(sides) > 1 and sides[-1] >= 32:
        squares = numel // sides[0] + numel // sides[1]
    # The average's other end, and in bfloat16 every 11th element of the first weights and of the summed gradients.
    return 4 * numel + 4 * squares + 2 * (1 if options.use_speed else 2) * -(-numel // 11)


def _bitsandbytes(title: str, name: str, moments: int, bits: int, **changes: Any) -> Optimizer:
    options = {"Options": AdamOptions if moments == 2 else LionOptions, **changes}
    return Optimizer(
        f"{title}, of bitsandbytes; needs a GPU and the extra `gpu`",
        build=f"{_MODULE}quantized:build_{name}",
        state_bytes=_quantized(moments) if bits == 8 else lambda shape, _: 4 * moments * _count(shape),
        package="bitsandbytes",
        extra="gpu",
        needs_gpu=True,
        keeps_layout=False,
        **options,
    )


ADAMW = Optimizer(
    "AdamW of torch, fused",
    build=f"{_MODULE}optimizers:build_adamw",
    state_bytes=lambda shape, options: 8 * _count(shape) + 4,
    Options=AdamOptions,
    moments=("exp_avg", "exp_avg_sq"),
    offloads=True,
)
ADAMW8BIT = _bitsandbytes("AdamW with states of 8 bits", "adamw8bit", 2, 8)
PAGED_ADAMW = _bitsandbytes(
    "AdamW whose states move to host memory while the GPU is full",
    "paged_adamw",
    2,
    32,
    aliases=("PagedAdamW32bit",),
)
PAGED_ADAMW8BIT = _bitsandbytes("paged AdamW with states of 8 bits", "paged_adamw8bit", 2, 8)
LION = Optimizer(
    "sign of a momentum (Chen et al. 2023); a third to a tenth of AdamW's learning rate",
    build=f"{_MODULE}lion:build",
    state_bytes=lambda shape, options: 4 * _count(shape) + 4,
    Options=LionOptions,
    scratch=4,
    moments=("exp_avg",),
)
LION8BIT = _bitsandbytes("Lion with a state of 8 bits", "lion8bit", 1, 8)
PAGED_LION = _bitsandbytes("Lion whose state moves to host memory while the GPU is full", "paged_lion", 1, 32)
PAGED_LION8BIT = _bitsandbytes("paged Lion with a state of 8 bits", "paged_lion8bit", 1, 8)
ADAFACTOR = Optimizer(
    "row and column means in place of second moments, no momentum: almost no state",
    build=f"{_MODULE}adafactor:build",
    state_bytes=lambda shape, options: 4 * _factors(shape) + 4,
    Options=AdafactorOptions,
    scratch=4,
)
CAME = Optimizer(
    "Adafactor with momentum, damped where updates deviate (Luo et al. 2023); a tenth to a fifth of AdamW's rate",
    build=f"{_MODULE}came:build",
    state_bytes=lambda shape, options: _came_bytes(shape, options) + 4,
    Options=CameOptions,
    scratch=8,
)
PRODIGY = Optimizer(
    "AdamW that estimates its learning rate (Mishchenko & Defazio 2023); `learning_rate: 1`",
    build=f"{_MODULE}prodigy:build",
    state_bytes=_prodigy_bytes,
    Options=ProdigyOptions,
    scratch=4,
    steps_alone=False,
    effective_rate=f"{_MODULE}prodigy:effective_rate",
)
PRODIGY_SCHEDULEFREE = Optimizer(
    "Prodigy with Schedule-Free's average, by prodigy-plus-schedule-free; `learning_rate: 1`",
    build=f"{_MODULE}schedule_free:build_prodigy",
    state_bytes=_prodigy_free_bytes,
    Options=ProdigyFreeOptions,
    scratch=8,
    steps_alone=False,
    average=f"{_MODULE}schedule_free:averaged",
    effective_rate=f"{_MODULE}schedule_free:effective_prodigy_rate",
    aliases=("ProdigyPlusScheduleFree",),
)
ADAMW_SCHEDULEFREE = Optimizer(
    "AdamW that averages its weights in place of a schedule (Defazio et al. 2024)",
    build=f"{_MODULE}schedule_free:build_adamw",
    state_bytes=lambda shape, options: 8 * _count(shape),
    Options=ScheduleFreeOptions,
    scratch=4,
    steps_alone=False,
    average=f"{_MODULE}schedule_free:averaged",
    effective_rate=f"{_MODULE}schedule_free:effective_rate",
    aliases=("ScheduleFreeAdamW",),
)
