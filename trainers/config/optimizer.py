"""The ``optimizer:`` section of a recipe."""

from __future__ import annotations

import ast
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, model_validator

from dreamfleet.datasets.config_base import Section
from dreamfleet.datasets.registry import EntryName
from dreamfleet.trainers.config.learning_rate import (
    POLYNOMIAL_END,
    ScheduleName,
    parse_rules,
    parse_webui_schedule,
)
from dreamfleet.trainers.config.optimizers import OPTIMIZERS, Optimizer, OptimizerOptions, canonical_name


def _read_number(value: Any) -> Any:
    # YAML 1.1 reads 1e-5 as text (only 1.0e-5 is a number), and so would a union of float and str.
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _check_rate(value: float | str) -> float | str:
    if isinstance(value, str):
        parse_webui_schedule(value)
    elif value < 0:
        raise ValueError("a learning rate cannot be negative")
    return value


def _check_rules(value: str) -> str:
    parse_rules(value)
    return value


def _read_arguments(value: Any) -> Any:
    # kohya's optimizer_args: ["betas=0.9,0.99", "decouple=True"], or all in one text.
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, list | tuple):
        return value
    found: dict[str, Any] = {}
    for argument in value:
        key, sign, text = str(argument).partition("=")
        if not (key and sign):
            raise ValueError(f"{argument!r} is not of the form key=value")
        try:
            found[key] = ast.literal_eval(text)  # constants only
        except (ValueError, SyntaxError):
            found[key] = {"true": True, "false": False}.get(text.lower(), text)
    return found


Rate = Annotated[float | str, BeforeValidator(_read_number), AfterValidator(_check_rate)]


class OptimizerConfig(Section):
    """The ``optimizer:`` section: optimizer, learning rates and their schedule."""

    name: Annotated[
        str,
        BeforeValidator(lambda value: canonical_name(value) if isinstance(value, str) else value),
        AfterValidator(EntryName(OPTIMIZERS)),
    ] = Field(
        "adamw",
        validation_alias=AliasChoices("name", "optimizer_type"),
        description="see [optimizers](#optimizers); names of other programs, such as kohya's `AdamW8bit` or "
        "`prodigyopt.Prodigy`, are accepted",
    )
    options: Annotated[dict[str, Any], BeforeValidator(_read_arguments)] = Field(
        {},
        exclude_if=lambda options: not options,
        validation_alias=AliasChoices("options", "optimizer_args"),
        description="further settings of the optimizer: [its keys](#optimizers), or kohya's list `[d_coef=2, ...]`",
    )
    fused_backward: bool = Field(
        False,
        validation_alias=AliasChoices("fused_backward", "fused_backward_pass"),
        description="update each parameter during the backward pass and free its gradient at once; needs one worker, "
        "no gradient accumulation and max_grad_norm: 0",
    )
    learning_rate: Rate = Field(
        5e-6,
        validation_alias=AliasChoices("learning_rate", "unet_lr", "lr"),
        description="a number, or the webui's schedule string",
    )
    text_encoder_lr: Rate | None = Field(
        None,
        validation_alias=AliasChoices("text_encoder_lr", "learning_rate_te", "learning_rate_te1"),
        description="learning rate of the text encoder, if it is trained; default: learning_rate",
    )
    text_encoder_2_lr: Rate | None = Field(
        None,
        validation_alias=AliasChoices("text_encoder_2_lr", "learning_rate_te2"),
        description="learning rate of SDXL's second text encoder; default: text_encoder_lr",
    )
    lr_scheduler: ScheduleName = Field(
        "constant", description="diffusers' schedules, updated once per optimizer step"
    )
    lr_warmup_steps: int = Field(0, ge=0, description="optimizer steps, for any number of workers")
    lr_num_cycles: float = Field(
        1,
        gt=0,
        validation_alias=AliasChoices("lr_num_cycles", "lr_scheduler_num_cycles"),
        description="cycles of cosine_with_restarts; cosine is always half a period, as in diffusers",
    )
    lr_power: float = Field(
        1.0,
        gt=0,
        validation_alias=AliasChoices("lr_power", "lr_scheduler_power"),
        description="power of the polynomial schedule",
    )
    lr_rules: Annotated[str, AfterValidator(_check_rules)] = Field(
        "1.0",
        validation_alias=AliasChoices("lr_rules", "step_rules"),
        description="piecewise_constant: '1:10,0.1:20,0.005'",
    )
    scale_lr: bool = Field(
        False,
        description="multiply the rates by workers x train_batch_size x gradient_accumulation_steps, as diffusers does",
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's and Prodigy's beta 1")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's and Prodigy's beta 2")
    adam_weight_decay: float = Field(1e-2, ge=0, description="weight decay of any optimizer")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's and Prodigy's epsilon")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0: no clipping")

    @property
    def kind(self) -> Optimizer:
        """The description of the optimizer."""
        return OPTIMIZERS.get(self.name)

    def own_options(self) -> OptimizerOptions:
        """Return the optimizer's own options, completed by the keys ``adam_*``. Raises ValidationError if invalid."""
        options = self.kind.Options.model_validate(self.options)
        given = {}
        for name, keys in options.shared.items():
            if getattr(options, name) is None:
                values = tuple(getattr(self, key) for key in keys)
                given[name] = values if len(values) > 1 else values[0]
        return options.model_copy(update=given)

    @model_validator(mode="after")
    def _check_fused(self) -> OptimizerConfig:
        if self.fused_backward and self.max_grad_norm:
            raise ValueError(
                "fused_backward: true frees each gradient before the norm of all is known, so it cannot clip; set "
                "max_grad_norm: 0 (adafactor clips its own updates), or fused_backward: false"
            )
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> OptimizerConfig:
        if isinstance(self.learning_rate, str) and self.lr_scheduler != "constant":
            raise ValueError(
                "a schedule string as learning_rate needs lr_scheduler: constant; use one or the other"
            )
        rates = (self.learning_rate, self.text_encoder_lr, self.text_encoder_2_lr)
        if self.scale_lr and any(isinstance(rate, str) for rate in rates):
            raise ValueError("scale_lr cannot be combined with a schedule string; write the final rates")
        if self.lr_scheduler == "polynomial" and float(self.learning_rate) <= POLYNOMIAL_END:
            raise ValueError(
                f"lr_scheduler: polynomial ends at a rate of {POLYNOMIAL_END:g}, as in diffusers, and learning_rate "
                f"{self.learning_rate} is not above it; use linear"
            )
        return self
