"""The recipe's `data:` section: where the pictures and words are and how they are shown."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from dreamfleet.datasets.config_base import Section, as_list
from dreamfleet.datasets.path_field import PathField

# Pillow refuses larger images itself (twice its warning limit), so this is the largest limit that has an effect.
MAX_PIXELS = 178_956_970
CAPTION_EXTENSIONS = (".txt", ".caption")
MOST_CLASSES = 1000  # of labelled images


# Images are checked and compared when they are indexed.
ImageDir = Annotated[str, PathField("images", must_exist=False, compared=False), Field(min_length=1)]


def _also(name: str, *others: str) -> AliasChoices:
    return AliasChoices(name, *others)


class Concept(Section):
    """One subject: its pictures, its prompt, and the pictures and prompt of its class."""

    instance_data_dir: ImageDir
    instance_prompt: str | None = None
    class_data_dir: ImageDir | None = None
    class_prompt: str | None = None
    repeats: int = Field(default=1, ge=1, validation_alias=_also("repeats", "num_repeats"))
    mask_dir: ImageDir | None = Field(
        default=None, validation_alias=_also("mask_dir", "conditioning_data_dir", "mask_path")
    )

    @model_validator(mode="after")
    def _class_has_prompt(self) -> Self:
        if self.class_data_dir and not self.class_prompt:
            raise ValueError(
                f"class_data_dir {self.class_data_dir!r} without class_prompt: say what its pictures show, "
                "such as class_prompt: 'a photo of a dog'"
            )
        return self


class DataConfig(Section):
    """Exactly one of `instance_data_dir`, `train_data_dir`, `concepts_list` names the pictures.

    `train_data_dir` is kohya's layout (`10_sks dog/` = repeats and prompt; then `class_data_dir`, also
    spelled `reg_data_dir`, holds `1_dog/`) or a plain folder with a metadata table or caption files.
    A picture's own caption is used before `instance_prompt`, unless `use_captions` is false.
    """

    instance_data_dir: ImageDir | None = Field(
        default=None, validation_alias=_also("instance_data_dir", "image_dir")
    )
    instance_prompt: str | None = Field(
        default=None, validation_alias=_also("instance_prompt", "class_tokens", "trigger_word")
    )
    class_data_dir: ImageDir | None = Field(
        default=None, validation_alias=_also("class_data_dir", "reg_data_dir")
    )
    class_prompt: str | None = None
    train_data_dir: ImageDir | None = None
    concepts_list: Annotated[list[Concept] | str | None, PathField("file")] = None

    caption_extension: Annotated[list[str], BeforeValidator(as_list)] = Field(
        default=list(CAPTION_EXTENSIONS)
    )
    caption_column: str | None = Field(
        default=None,
        min_length=1,
        description="column of metadata.jsonl, .csv or .parquet that holds the captions; when left out text, "
        "caption or prompt",
    )
    caption_from_filename: bool = Field(
        default=False,
        description="an image without a caption gets the words of its file name: `01-a red apple.png` is `a red apple`",
    )
    use_captions: bool = True
    caption_prefix: str = Field(
        default="",
        description="words in front of every caption, and a space; class images get none of these options",
    )
    caption_suffix: str = Field(default="", description="a space, and words behind every caption")
    shuffle_tags: bool = Field(default=False, validation_alias=_also("shuffle_tags", "shuffle_caption"))
    keep_tokens: int = Field(default=0, ge=0)
    keep_tokens_separator: str = Field(
        default="",
        description="such as |||: the tags before the first one, and behind a second one, are neither shuffled nor "
        "dropped; captions without it go by keep_tokens",
    )
    tag_dropout: float = Field(
        default=0.0,
        ge=0,
        le=1,
        validation_alias=_also("tag_dropout", "caption_tag_dropout_rate", "tag_drop_out"),
    )
    caption_dropout: float = Field(
        default=0.0,
        ge=0,
        le=1,
        validation_alias=_also("caption_dropout", "caption_dropout_rate", "proportion_empty_prompts"),
    )

    resolution: int = Field(default=512, ge=8, le=8192)
    center_crop: bool = True
    random_flip: bool = Field(default=False, validation_alias=_also("random_flip", "flip_aug"))
    repeats: int = Field(default=1, ge=1, validation_alias=_also("repeats", "num_repeats"))
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, le=MAX_PIXELS)

    enable_bucket: bool = Field(
        default=False,
        description="keep the pictures' shapes: each goes to the bucket of the nearest aspect ratio, about resolution "
        "squared pixels large, and every batch is of one bucket",
    )
    min_bucket_reso: int = Field(default=256, ge=8, description="shortest side of a bucket")
    max_bucket_reso: int = Field(default=1024, ge=8, description="longest side of a bucket")
    bucket_reso_steps: int = Field(default=64, ge=8, description="sides are multiples of this")
    bucket_no_upscale: bool = Field(
        default=False,
        description="no picture is enlarged: buckets of any size up to the pictures' own, without the two limits",
    )

    alpha_mask: bool = Field(
        default=False,
        validation_alias=_also("alpha_mask", "masked_loss", "use_weight", "use_att_map"),
        description="weigh the loss over each picture by its mask (in mask_dir, or NAME.mask.png), else by "
        "DreamArtist's attention map (NAME_att.png: black 0, mid-grey 1, white 5), else by its alpha channel; mean 1, "
        "so a picture that is opaque everywhere counts as ever",
    )
    mask_dir: ImageDir | None = Field(
        default=None,
        validation_alias=_also("mask_dir", "conditioning_data_dir", "mask_path"),
        description="folder of masks under the pictures' names: grey, white counts",
    )

    source: Literal["auto", "resident", "stream"] = "auto"
    resident_limit_mb: int = Field(default=4096, ge=1)
    cache_latents: bool = True
    cache_dir: Annotated[str | None, PathField("folder", must_exist=False, compared=False)] = Field(
        default=None,
        min_length=1,
        description="folder or s3:// address of latents that `dreamfleet data cache` encoded: the run reads them and "
        "decodes no picture",
    )
    cache_precision: Literal["float32", "fp16"] = Field(
        default="float32",
        description="of the latents in cache_dir; float32 gives the losses of a run that encodes itself, fp16 takes "
        "half the room",
    )
    latent_sampling: Literal["random", "once", "deterministic"] = Field(
        default="random", validation_alias=_also("latent_sampling", "latent_sampling_method")
    )

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        places = ("instance_data_dir", "train_data_dir", "concepts_list")
        given = [name for name in places if getattr(self, name) is not None]
        if len(given) != 1:
            what = "no pictures are named" if not given else f"{' and '.join(given)} are both set"
            raise ValueError(
                f"{what}: set exactly one of instance_data_dir (one subject), train_data_dir (kohya folders "
                "or captioned pictures), concepts_list (several subjects)"
            )
        if self.concepts_list is not None:
            if not self.concepts_list:
                raise ValueError("concepts_list is empty: list at least one concept with instance_data_dir")
            for_one = ("instance_prompt", "class_data_dir", "class_prompt", "mask_dir")
            extra = [name for name in for_one if getattr(self, name) is not None]
            if extra:
                raise ValueError(f"{', '.join(extra)} beside concepts_list: write it inside each concept")
        if self.instance_data_dir and self.class_data_dir and not self.class_prompt:
            raise ValueError(
                f"class_data_dir {self.class_data_dir!r} without class_prompt: say what its pictures show, "
                "such as class_prompt: 'a photo of a dog'"
            )
        return self

    @model_validator(mode="after")
    def _extensions_are_suffixes(self) -> Self:
        if not self.caption_extension:
            raise ValueError("caption_extension is empty: write '.txt', or use_captions: false")
        for extension in self.caption_extension:
            if not extension.startswith(".") or "/" in extension:
                raise ValueError(f"caption_extension {extension!r} is not a file ending: write '.txt'")
        return self

    @model_validator(mode="after")
    def _buckets_hold_the_resolution(self) -> Self:
        if not self.enable_bucket or self.bucket_no_upscale:
            return self
        if not self.min_bucket_reso <= self.resolution <= self.max_bucket_reso:
            raise ValueError(
                f"enable_bucket: resolution {self.resolution} is not between min_bucket_reso {self.min_bucket_reso} "
                f"and max_bucket_reso {self.max_bucket_reso}; set those around it, such as a half and twice"
            )
        for name in ("min_bucket_reso", "max_bucket_reso"):
            if getattr(self, name) % self.bucket_reso_steps:
                raise ValueError(
                    f"{name} {getattr(self, name)} is not a multiple of bucket_reso_steps {self.bucket_reso_steps}"
                )
        return self

    @model_validator(mode="after")
    def _masks_are_used(self) -> Self:
        concepts = self.concepts_list if isinstance(self.concepts_list, list) else []
        if not self.alpha_mask and (self.mask_dir or any(concept.mask_dir for concept in concepts)):
            raise ValueError("mask_dir without alpha_mask: set alpha_mask: true, or leave mask_dir out")
        return self

    @model_validator(mode="after")
    def _latents_can_be_kept(self) -> Self:
        if self.cache_dir is None:
            return self
        if not self.center_crop:
            raise ValueError(
                "cache_dir with center_crop: false: a picture cropped anew at every use has no latents to keep; set "
                "center_crop: true (enable_bucket keeps shapes), or leave cache_dir out"
            )
        if not self.cache_latents:
            raise ValueError("cache_dir with cache_latents: false: leave one of them out")
        return self
