"""The ``method:`` section of textual_inversion."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import AliasChoices, Field, model_validator

from dreamfleet.datasets.captions import TEMPLATE_SETS
from dreamfleet.datasets.path_field import PathField
from dreamfleet.trainers.config.method import MethodConfig


class TextualInversionConfig(MethodConfig):
    """The ``method:`` section of Textual Inversion."""

    implementation: ClassVar[str] = "dreamfleet.trainers.methods.textual_inversion:TextualInversion"
    summary: ClassVar[str] = (
        "Teach a new word: n vectors learn, the model stays as it is. Kilobytes, combines with anything."
    )
    artifacts: ClassVar[tuple[str, ...]] = ("embedding",)

    name: Literal["textual_inversion"] = "textual_inversion"
    placeholder_token: str = Field(
        min_length=1, validation_alias=AliasChoices("placeholder_token", "token_string", "trigger_word")
    )
    initializer_token: str = Field(
        "", validation_alias=AliasChoices("initializer_token", "init_word", "initialization_text")
    )
    num_vectors: int = Field(
        1,
        ge=1,
        le=75,
        validation_alias=AliasChoices("num_vectors", "num_vectors_per_token", "vectors_per_token"),
    )
    initial_embedding: Annotated[str | None, PathField("file", is_start=True)] = Field(
        None,
        description="an embedding's file to go on from, of num_vectors vectors; its steps count on in what is "
        "exported, and a webui `.optim` beside it that fits brings Adam's moments; not read again once there is a "
        "checkpoint",
    )
    learnable_property: Literal["object", "style"] = "object"
    template_file: Annotated[str | None, PathField("file", names=TEMPLATE_SETS)] = Field(
        None,
        description="a prompt a line, with [name] and [filewords]; or a set's name: object, style_filewords",
    )

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        if self.initial_embedding and self.initializer_token:
            raise ValueError(
                "initial_embedding and initializer_token both say where the vectors start; give one"
            )
        return self
