"""The ``method:`` section of Advanced Prompt Tuning (DreamArtist)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, AliasChoices, Field, model_validator

from dreamfleet.datasets.captions import TEMPLATE_SETS
from dreamfleet.datasets.path_field import PathField
from dreamfleet.trainers.config.guidance import parse_guidance
from dreamfleet.trainers.config.method import MethodConfig, SearchSpace
from dreamfleet.trainers.config.model import HUB_MODEL


def _check_guidance(value: float | str) -> float | str:
    parse_guidance(value)
    return value


class PromptTuningConfig(MethodConfig):
    """The options of Advanced Prompt Tuning."""

    implementation: ClassVar[str] = "dreamfleet.trainers.methods.prompt_tuning:PromptTuning"
    summary: ClassVar[str] = (
        "Trains a word for the prompt and one for the negative prompt together, from as little as one image. Kilobytes."
    )
    artifacts: ClassVar[tuple[str, ...]] = ("embedding",)
    search_spaces: ClassVar[Mapping[str, SearchSpace]] = {
        "prompt_tuning": {
            "optimizer.learning_rate": {"distribution": "loguniform", "lower": 5e-4, "upper": 1e-2},
            "method.num_vectors": {"distribution": "choice", "values": [1, 3, 6]},
            "method.num_vectors_neg": {"distribution": "choice", "values": [3, 6]},
        },
    }
    packs: ClassVar[bool] = True

    name: Literal["prompt_tuning"] = "prompt_tuning"
    placeholder_token: str = Field(
        min_length=1,
        validation_alias=AliasChoices("placeholder_token", "token_string", "trigger_word"),
        description="the word in prompts; the negative prompt's word is the same with -neg",
    )
    initializer_token: str = Field(
        "*",
        validation_alias=AliasChoices("initializer_token", "init_word", "initialization_text"),
        description="text from which both start; the negative one with a little noise",
    )
    num_vectors: int = Field(
        3,
        ge=1,
        le=75,
        validation_alias=AliasChoices("num_vectors", "num_vectors_per_token", "vectors_per_token"),
        description="vectors of the word; more store more detail and use more of the prompt's tokens",
    )
    num_vectors_neg: int = Field(6, ge=1, le=75, description="vectors of the negative word")
    cfg_scale: Annotated[float | str, AfterValidator(_check_guidance)] = Field(
        3.0,
        description="guidance scale in training: fixed, or low-high over the timesteps along a curve (ln, cos, cos2), "
        "as "
        "in 1.5-3.0:cos; generate with about the same",
    )
    neg_lr_w: float = Field(
        1.0,
        gt=0,
        validation_alias=AliasChoices("neg_lr_w", "negative_lr_scale"),
        description="learning rate of the negative word, as a multiple",
    )
    rec_loss_w: float = Field(
        0.0,
        ge=0,
        validation_alias=AliasChoices("rec_loss_w", "reconstruction_loss_weight"),
        description="weight of the reconstruction loss between the estimated image, decoded, and the training image; "
        "0.01 to 1; needs more memory",
    )
    discriminator: Annotated[str | None, HUB_MODEL] = Field(
        None,
        description="a classifier whose loss on the estimated image, decoded, is added: an export of the method "
        "discriminator, DreamArtist's .pth, or a ConvNeXt on the hub; needs more memory",
    )
    discriminator_class: int = Field(
        1, ge=0, description="number of the class that the images should belong to"
    )
    discriminator_loss_w: float = Field(
        1.0,
        ge=0,
        description="weight of the discriminator's loss, which is 1 - the probability of that class",
    )
    discriminator_replaces: bool = Field(
        False, description="use the discriminator's loss alone, as DreamArtist does"
    )
    template_file: Annotated[str, PathField("file", names=TEMPLATE_SETS)] = Field(
        "subject",
        description="a file with one prompt per line, with [name] and [filewords], or a built-in set: style, "
        "subject_filewords",
    )
    negative_prompt: str | None = Field(
        None,
        description="the negative prompt in training, with [name] for the word; default: the image's prompt with the "
        "negative word in place of the word",
    )

    @model_validator(mode="after")
    def _check_negative(self) -> Self:
        if self.negative_prompt is not None and "[name]" not in self.negative_prompt:
            raise ValueError(
                f"negative_prompt: {self.negative_prompt!r} has no [name], so the negative word would not be trained"
            )
        return self

    @model_validator(mode="after")
    def _check_discriminator(self) -> Self:
        if self.discriminator_replaces and self.discriminator is None:
            raise ValueError("discriminator_replaces: true needs a discriminator; set one")
        if self.discriminator_replaces and self.rec_loss_w:
            raise ValueError(
                "rec_loss_w cannot be combined with discriminator_replaces: true, which uses the discriminator's loss "
                "alone; leave one of them out"
            )
        return self
