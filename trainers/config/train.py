"""The ``train:`` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from dreamfleet.datasets.config_base import Section
from dreamfleet.trainers.config.loss import LossConfig
from dreamfleet.trainers.config.noise import NoiseConfig

USUAL_CHECKPOINTING_STEPS = 500
#: The keys of the recipe that only methods with a denoising loss use.
DENOISING_KEYS = tuple(f"train.{key}" for key in (*LossConfig.model_fields, *NoiseConfig.model_fields))


class StepConfig(Section):
    """How long a training is, and what a step computes."""

    max_train_steps: int | None = Field(None, ge=1, description="optimizer steps, for any number of workers")
    num_train_epochs: float | None = Field(
        None,
        gt=0,
        validation_alias=AliasChoices("num_train_epochs", "max_train_epochs", "epoch"),
        description="passes over the images, instead of max_train_steps",
    )
    train_batch_size: int = Field(
        1, ge=1, validation_alias=AliasChoices("train_batch_size", "batch_size"), description="per worker"
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="batches whose gradients are accumulated for one optimizer step"
    )
    seed: int = Field(0, ge=0, description="seed of the training; equal seeds give equal runs")
    # YAML 1.1 reads an unquoted no as false.
    mixed_precision: Annotated[
        Literal["no", "bf16", "fp16"], BeforeValidator(lambda value: "no" if value is False else value)
    ] = Field("no", description="precision of the computation; the weights stay in float32 (see full_bf16)")
    full_bf16: bool = Field(
        False,
        description="also keep the weights in bfloat16, rounded stochastically after each step: half the memory (needs "
        "mixed_precision: bf16)",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="recompute activations in the backward pass: less memory, about a quarter more time",
    )


# pydantic lists the keys of the last base class first.
class TrainConfig(NoiseConfig, LossConfig, StepConfig):
    """The ``train:`` section: length, batches, precision, loss, noise, checkpoints and exports."""

    checkpointing_steps: int | None = Field(
        None,
        ge=1,
        validation_alias=AliasChoices("checkpointing_steps", "save_every_n_steps"),
        description="optimizer steps between checkpoints; default: 500, or save_every_n_epochs",
    )
    save_every_n_epochs: int | None = Field(
        None, ge=1, description="epochs between checkpoints, instead of checkpointing_steps"
    )
    checkpoints_total_limit: int | None = Field(
        3, ge=1, description="checkpoints that are kept; older ones are deleted"
    )
    log_steps: int = Field(10, ge=1, description="optimizer steps between log lines")
    profile_steps: tuple[int, int] | None = Field(
        None,
        description="first and last step, such as [10, 13], whose trace for ui.perfetto.dev every rank writes to "
        "`profile/` of the run folder; they do not count in times and speeds",
    )
    save_precision: Literal["fp32", "fp16", "bf16"] = Field(
        "fp32", description="precision of exported models"
    )
    export: bool = Field(
        True,
        description="export the artifacts when the run is complete; with false only `dreamfleet export` writes them",
    )
    export_formats: list[str] | None = Field(None, description="default: the method's usual formats")

    @model_validator(mode="after")
    def _check_pairs(self) -> TrainConfig:
        for one, other in (
            ("max_train_steps", "num_train_epochs"),
            ("checkpointing_steps", "save_every_n_epochs"),
        ):
            values = getattr(self, one), getattr(self, other)
            if None not in values:
                raise ValueError(
                    f"{one}: {values[0]} and {other}: {values[1]:g} are both set; "
                    f"keep one (an override removes the other: train.{one}=null or train.{other}=null)"
                )
        return self

    @model_validator(mode="after")
    def _check_profile(self) -> TrainConfig:
        if (steps := self.profile_steps) is not None and not 1 <= steps[0] <= steps[1]:
            raise ValueError(f"profile_steps: {steps}: give the first and the last step, such as [10, 13]")
        return self

    @model_validator(mode="after")
    def _check_precision(self) -> TrainConfig:
        if self.full_bf16 and self.mixed_precision != "bf16":
            raise ValueError("full_bf16: true computes in bfloat16; set mixed_precision: bf16 as well")
        return self
