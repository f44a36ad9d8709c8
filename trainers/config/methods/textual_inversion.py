"""The ``method:`` section of Textual Inversion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AliasChoices, Field, model_validator

from dreamfleet.datasets.captions import TEMPLATE_SETS
from dreamfleet.datasets.path_field import PathField
from dreamfleet.trainers.config.method import MethodConfig, SearchSpace


class TextualInversionConfig(MethodConfig):
    """The options of Textual Inversion."""

    display_name: ClassVar[str] = "Textual Inversion"
    implementation: ClassVar[str] = "dreamfleet.trainers.methods.textual_inversion:TextualInversion"
    summary: ClassVar[str] = (
        "Trains the vectors of a new word; the model is not changed. Kilobytes, combines with everything."
    )
    artifacts: ClassVar[tuple[str, ...]] = ("embedding",)
    search_spaces: ClassVar[Mapping[str, SearchSpace]] = {
        "textual_inversion": {
            "optimizer.learning_rate": {"distribution": "loguniform", "lower": 5e-4, "upper": 2e-2},
            "method.num_vectors": {"distribution": "choice", "values": [1, 2, 4, 8]},
        },
    }
    packs: ClassVar[bool] = True

    name: Literal["textual_inversion"] = "textual_inversion"
    placeholder_token: str = Field(
        min_length=1,
        validation_alias=AliasChoices("placeholder_token", "token_string", "trigger_word"),
        description="the new word: `<my-cat>`",
    )
    initializer_token: str = Field(
        "",
        validation_alias=AliasChoices("initializer_token", "init_word", "initialization_text"),
        description="text from whose vectors training starts: `cat`",
    )
    num_vectors: int = Field(
        1,
        ge=1,
        le=75,
        validation_alias=AliasChoices("num_vectors", "num_vectors_per_token", "vectors_per_token"),
        description="vectors of the new word",
    )
    initial_embedding: Annotated[str | None, PathField("file", is_start=True)] = Field(
        None,
        description="an embedding file to continue from, with num_vectors vectors; exports continue its step count, "
        "and "
        "a matching webui `.optim` file beside it provides Adam's moments; not read when the run has a checkpoint",
    )
    learnable_property: Literal["object", "style"] = Field(
        "object", description="which built-in templates form the prompts"
    )
    template_file: Annotated[str | None, PathField("file", names=TEMPLATE_SETS)] = Field(
        None,
        description="a file with one prompt per line, with [name] and [filewords], or a built-in set: object, "
        "style_filewords",
    )

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        if self.initial_embedding and self.initializer_token:
            raise ValueError(
                "initial_embedding and initializer_token both set where the vectors start; give one"
            )
        return self
