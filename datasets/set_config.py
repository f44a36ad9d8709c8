"""Recipe sections of one image set: an entry of ``data.sets``, and a concept, which all sets are converted to."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, model_validator

from dreamfleet.datasets.conditions import check_condition
from dreamfleet.datasets.config_base import Section, as_list
from dreamfleet.datasets.path_field import PathField

CAPTION_EXTENSIONS = (".txt", ".caption")
# Options of the `data:` section that a set can override.
OVERRIDES = (
    "caption_extension",
    "caption_column",
    "caption_from_filename",
    "use_captions",
    "caption_prefix",
    "caption_suffix",
    "shuffle_tags",
    "keep_tokens",
    "keep_tokens_separator",
    "tag_dropout",
    "caption_dropout",
)

# must_exist and compared are false because images are checked and compared when they are indexed.
ImageDir = Annotated[str, PathField("images", must_exist=False, compared=False), Field(min_length=1)]
Condition = Annotated[str, Field(min_length=1), AfterValidator(check_condition)]
Rate = Annotated[float | None, Field(ge=0, le=1)]


def also(name: str, *others: str) -> AliasChoices:
    """Return the names under which a key is accepted."""
    return AliasChoices(name, *others)


class SetOptions(Section):
    """The options of one set. Caption options that are not set are those of the `data:` section."""

    repeats: int = Field(default=1, ge=1, validation_alias=also("repeats", "num_repeats"))
    weight: float | None = Field(
        default=None,
        gt=0,
        description="share of this set in the images of an epoch, relative to the weights of the other sets; in place "
        "of repeats. All sets or none have a weight",
    )
    mask_dir: ImageDir | None = Field(
        default=None, validation_alias=also("mask_dir", "conditioning_data_dir", "mask_path")
    )
    recursive: bool = Field(default=True, description="whether images in subfolders are used too")
    where: Condition | None = Field(default=None, description="as `data.where`, for this set; both apply")
    caption_extension: Annotated[list[str] | None, BeforeValidator(as_list)] = None
    caption_column: str | None = Field(default=None, min_length=1)
    caption_from_filename: bool | None = None
    use_captions: bool | None = None
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    shuffle_tags: bool | None = Field(default=None, validation_alias=also("shuffle_tags", "shuffle_caption"))
    keep_tokens: int | None = Field(default=None, ge=0)
    keep_tokens_separator: str | None = None
    tag_dropout: Rate = Field(
        default=None, validation_alias=also("tag_dropout", "caption_tag_dropout_rate", "tag_drop_out")
    )
    caption_dropout: Rate = Field(
        default=None,
        validation_alias=also("caption_dropout", "caption_dropout_rate", "proportion_empty_prompts"),
    )

    @property
    def overrides(self) -> dict[str, Any]:
        """The options of the `data:` section that this set changes, with their values."""
        return {name: value for name in OVERRIDES if (value := getattr(self, name)) is not None}


class Concept(SetOptions):
    """One subject: its images and prompt, and the images and prompt of its class."""

    instance_data_dir: ImageDir
    instance_prompt: str | None = None
    class_data_dir: ImageDir | None = None
    class_prompt: str | None = None

    @model_validator(mode="after")
    def _class_has_prompt(self) -> Self:
        if self.class_data_dir and not self.class_prompt:
            raise ValueError(
                f"class_data_dir {self.class_data_dir!r} without class_prompt: set it to a description of its images, "
                "such as class_prompt: 'a photo of a dog'"
            )
        return self


class ImageSet(SetOptions):
    """One entry of ``data.sets``: a source of images, its prompt, and its share in an epoch."""

    source: ImageDir = Field(
        validation_alias=also("source", "image_dir", "instance_data_dir"),
        description="a folder, kohya's numbered folders, tar shards, a table, a dataset file; local or in a bucket",
    )
    prompt: str | None = Field(
        default=None, validation_alias=also("prompt", "class_tokens", "instance_prompt", "trigger_word")
    )
    class_source: ImageDir | None = Field(
        default=None,
        validation_alias=also("class_source", "class_data_dir", "reg_data_dir"),
        description="class images of this set",
    )
    class_prompt: str | None = None
    is_reg: bool = Field(
        default=False,
        description="the images of this entry are class images, and `prompt` is their class prompt, for the sets "
        "whose prompt ends in it, or for all sets if it is the only such entry",
    )

    @model_validator(mode="after")
    def _class_images_are_plain(self) -> Self:
        if self.class_source and not self.class_prompt:
            raise ValueError(
                f"class_source {self.class_source!r} without class_prompt: set it to a description of its images, "
                "such as class_prompt: 'a photo of a dog'"
            )
        if not self.is_reg:
            return self
        if not self.prompt:
            raise ValueError(
                f"is_reg: true without prompt: set it to the class of the images in {self.source}, such as 'dog'"
            )
        for name in ("class_source", "class_prompt", "weight", "where", "mask_dir"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} in an entry with is_reg: true: remove it")
        return self
