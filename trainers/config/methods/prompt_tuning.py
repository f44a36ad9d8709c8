"""The ``method:`` section of prompt_tuning."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, AliasChoices, Field, model_validator

from dreamfleet.datasets.captions import TEMPLATE_SETS
from dreamfleet.datasets.path_field import PathField
from dreamfleet.trainers.config.guidance import parse_guidance
from dreamfleet.trainers.config.method import MethodConfig
from dreamfleet.trainers.config.model import HUB_MODEL


def _check_guidance(value: float | str) -> float | str:
    parse_guidance(value)
    return value


class PromptTuningConfig(MethodConfig):
    """The ``method:`` section of Advanced Prompt Tuning."""

    implementation: ClassVar[str] = "dreamfleet.trainers.methods.prompt_tuning:PromptTuning"
    summary: ClassVar[str] = (
        "Teach a new word and what to steer away from, from one picture: vectors for the prompt and its negative."
    )
    artifacts: ClassVar[tuple[str, ...]] = ("embedding",)

    name: Literal["prompt_tuning"] = "prompt_tuning"
    placeholder_token: str = Field(
        min_length=1,
        validation_alias=AliasChoices("placeholder_token", "token_string", "trigger_word"),
        description="the word in prompts; the negative's is the same with -neg",
    )
    initializer_token: str = Field(
        "*",
        validation_alias=AliasChoices("initializer_token", "init_word", "initialization_text"),
        description="what both start from; the negative with a little noise",
    )
    num_vectors: int = Field(
        3,
        ge=1,
        le=75,
        validation_alias=AliasChoices("num_vectors", "num_vectors_per_token", "vectors_per_token"),
        description="vectors of the word; more hold more detail and take more of the prompt",
    )
    num_vectors_neg: int = Field(6, ge=1, le=75, description="vectors of the negative")
    cfg_scale: Annotated[float | str, AfterValidator(_check_guidance)] = Field(
        3.0,
        description="guidance trained through, fixed or low-high by the timestep with a curve (ln, cos, cos2): "
        "1.5-3.0:cos; draw with about the same",
    )
    neg_lr_w: float = Field(
        1.0,
        gt=0,
        validation_alias=AliasChoices("neg_lr_w", "negative_lr_scale"),
        description="times the learning rate, for the negative",
    )
    rec_loss_w: float = Field(
        0.0,
        ge=0,
        validation_alias=AliasChoices("rec_loss_w", "reconstruction_loss_weight"),
        description="weight of the reconstruction loss: the estimated picture, decoded, against the real one; 0.01 "
        "to 1, and more memory",
    )
    discriminator: Annotated[str | None, HUB_MODEL] = Field(
        None,
        description="a classifier that judges the estimated picture, decoded: what method discriminator exports, "
        "DreamArtist's .pth, a ConvNeXt on the hub; more memory",
    )
    discriminator_class: int = Field(1, ge=0, description="number of the class the pictures are to be of")
    discriminator_loss_w: float = Field(
        1.0, ge=0, description="weight of the discriminator's loss, 1 - probability of that class"
    )
    discriminator_replaces: bool = Field(
        False, description="learn from the discriminator's loss alone, as DreamArtist does"
    )
    template_file: Annotated[str, PathField("file", names=TEMPLATE_SETS)] = Field(
        "subject",
        description="a prompt a line, with [name] and [filewords]; or a set's name: style, subject_filewords",
    )
    negative_prompt: str | None = Field(
        None,
        description="what the negative is trained in, with [name] for its word; when left out the picture's own "
        "prompt with that word",
    )

    @model_validator(mode="after")
    def _check_negative(self) -> Self:
        if self.negative_prompt is not None and "[name]" not in self.negative_prompt:
            raise ValueError(
                f"negative_prompt: {self.negative_prompt!r} has no [name], so the negative would never learn"
            )
        return self

    @model_validator(mode="after")
    def _check_discriminator(self) -> Self:
        if self.discriminator_replaces and self.discriminator is None:
            raise ValueError("discriminator_replaces: true needs a discriminator to learn from; name one")
        if self.discriminator_replaces and self.rec_loss_w:
            raise ValueError(
                "rec_loss_w does not go with discriminator_replaces: true, which learns from the discriminator alone; "
                "leave one of them out"
            )
        return self
