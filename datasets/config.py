"""The recipe's `data:` section: where images and captions are, and how images are cropped, batched and cached."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dreamfleet.datasets.config_base import Section, as_list
from dreamfleet.datasets.image_options import MAX_PIXELS as MAX_PIXELS
from dreamfleet.datasets.path_field import PathField
from dreamfleet.datasets.set_config import CAPTION_EXTENSIONS as CAPTION_EXTENSIONS
from dreamfleet.datasets.set_config import Concept as Concept
from dreamfleet.datasets.set_config import Condition, ImageDir, ImageSet, SetOptions, also

MOST_CLASSES = 1000  # maximum number of classes of labelled images


class DataConfig(Section):
    """The `data:` section. One of `sets`, `instance_data_dir`, `train_data_dir` and `concepts_list` names the images.

    Each is a folder, a bucket address, or anything else that an image source reads. `train_data_dir` either
    has kohya's layout (`10_sks dog/` means 10 repeats and the prompt `sks dog`; `class_data_dir`, also spelled
    `reg_data_dir`, then contains `1_dog/`), or is a plain folder with a metadata table or caption files. An image's own
    caption has priority over `instance_prompt`, unless `use_captions` is false.
    """

    instance_data_dir: ImageDir | None = Field(
        default=None, validation_alias=also("instance_data_dir", "image_dir")
    )
    instance_prompt: str | None = Field(
        default=None, validation_alias=also("instance_prompt", "class_tokens", "trigger_word")
    )
    class_data_dir: ImageDir | None = Field(
        default=None, validation_alias=also("class_data_dir", "reg_data_dir")
    )
    class_prompt: str | None = None
    train_data_dir: ImageDir | None = None
    concepts_list: Annotated[list[Concept] | str | None, PathField("file")] = None
    sets: list[ImageSet] | None = Field(
        default=None,
        description="several image sets of any layout; the keys above are the short form for one",
    )

    where: Condition | None = Field(
        default=None,
        description="images to use, such as `aspect < 2 and tags has 'cat'`; see [Image sets](datasets.md#filters)",
    )
    min_size: int | None = Field(
        default=None, ge=1, description="images whose shorter side has fewer pixels are not used"
    )
    duplicates: Literal["keep", "exact", "near"] = Field(
        default="keep",
        description="exact: use only the first of identical files; near: also only the largest of images whose "
        "perceptual hashes differ in at most `near_distance` bits",
    )
    near_distance: int = Field(default=4, ge=0, le=16, description="of 64 bits; for duplicates: near")
    max_bad_fraction: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="a larger share of unusable images is an error; they are left out otherwise",
    )
    allow_private_urls: bool = Field(
        default=False,
        description="read images at http(s) addresses of private networks",
    )

    caption_extension: Annotated[list[str], BeforeValidator(as_list)] = Field(
        default=list(CAPTION_EXTENSIONS)
    )
    caption_column: str | None = Field(
        default=None,
        min_length=1,
        description="column of metadata.jsonl, .csv or .parquet with the captions; default: the first of text, caption "
        "and prompt",
    )
    caption_from_filename: bool = Field(
        default=False,
        description="take missing captions from file names: that of `01-a red apple.png` is `a red apple`",
    )
    use_captions: bool = True
    use_edits: bool = Field(
        default=True,
        description="apply what `dreamfleet data browse` stored beside the set: excluded images, captions, crops, "
        "focus points and masks",
    )
    caption_prefix: str = Field(
        default="",
        description="text before every caption, separated by a space; these options do not apply to class images",
    )
    caption_suffix: str = Field(default="", description="text after every caption, separated by a space")
    shuffle_tags: bool = Field(default=False, validation_alias=also("shuffle_tags", "shuffle_caption"))
    keep_tokens: int = Field(default=0, ge=0)
    keep_tokens_separator: str = Field(
        default="",
        description="such as |||: the tags before the first one, and after a second one, are neither shuffled nor "
        "dropped; captions without it follow keep_tokens",
    )
    tag_dropout: float = Field(
        default=0.0,
        ge=0,
        le=1,
        validation_alias=also("tag_dropout", "caption_tag_dropout_rate", "tag_drop_out"),
    )
    caption_dropout: float = Field(
        default=0.0,
        ge=0,
        le=1,
        validation_alias=also("caption_dropout", "caption_dropout_rate", "proportion_empty_prompts"),
    )

    resolution: int = Field(default=512, ge=8, le=8192)
    center_crop: bool = True
    random_flip: bool = Field(default=False, validation_alias=also("random_flip", "flip_aug"))
    repeats: int = Field(default=1, ge=1, validation_alias=also("repeats", "num_repeats"))
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, le=MAX_PIXELS)
    image_interpolation_mode: Literal["scaled_lanczos", "lanczos", "bicubic", "bilinear", "area"] = Field(
        default="scaled_lanczos",
        validation_alias=also("image_interpolation_mode", "resize_interpolation"),
        description="filter that resizes images; scaled_lanczos is Lanczos after a JPEG of at least twice the size has "
        "been decoded at 1/2, 1/4 or 1/8 of it, several times as fast",
    )

    enable_bucket: bool = Field(
        default=False,
        description="aspect-ratio bucketing: an image is trained in the bucket of the nearest aspect ratio, "
        "of about resolution squared pixels, and every batch is from one bucket",
    )
    min_bucket_reso: int = Field(default=256, ge=8, description="shortest side of a bucket")
    max_bucket_reso: int = Field(default=1024, ge=8, description="longest side of a bucket")
    bucket_reso_steps: int = Field(default=64, ge=8, description="sides are multiples of this")
    bucket_no_upscale: bool = Field(
        default=False,
        description="never enlarge an image: buckets have any size up to that of the images, without the two limits",
    )

    alpha_mask: bool = Field(
        default=False,
        validation_alias=also("alpha_mask", "masked_loss", "use_weight", "use_att_map"),
        description="weight the loss over each image by its mask (in mask_dir, or NAME.mask.png), else by "
        "DreamArtist's attention map (NAME_att.png: black 0, mid-grey 1, white 5), else by its alpha channel; the mean "
        "weight is 1, so an opaque image trains as without this option",
    )
    mask_dir: ImageDir | None = Field(
        default=None,
        validation_alias=also("mask_dir", "conditioning_data_dir", "mask_path"),
        description="folder of masks with the names of the images: greyscale, white has full weight",
    )

    shuffle: Literal["full", "shards"] = Field(
        default="full",
        description="order of an epoch: `full`, any; `shards`: images in the same tar or Parquet file stay near "
        "each other, so that few of these files are read at a time",
    )
    shuffle_window: int = Field(
        default=10_000,
        ge=1,
        description="with `shuffle: shards`, the number of images over which shards are mixed",
    )
    source: Literal["auto", "resident", "stream"] = "auto"
    resident_limit_mb: int = Field(default=4096, ge=1)
    cache_latents: bool = True
    cache_dir: Annotated[str | None, PathField("folder", must_exist=False, compared=False)] = Field(
        default=None,
        min_length=1,
        description="folder or s3:// address of latents that `dreamfleet data cache` encoded: the run reads these "
        "instead of decoding images",
    )
    cache: Literal["before_training", "while_training"] = Field(
        default="before_training",
        description="when cache_dir is filled: by `dreamfleet data cache` before the run, or by the run itself, which "
        "encodes the images that the cache lacks when it first needs them",
    )
    cache_resources: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        default=None,
        description="with cache: while_training, Ray resources, such as {CPU: 4} or {GPU: 1}, of a process of its own "
        "that encodes ahead of the training; default: the training worker encodes",
    )
    cache_actors: int = Field(
        default=1, ge=1, description="number of processes with cache_resources for each training worker"
    )
    class_cache_dir: Annotated[
        str | None, PathField("folder", must_exist=False, compared=False, is_output=True)
    ] = Field(
        default=None,
        min_length=1,
        description="folder or s3:// address of the latents of class images: the run reads these, and adds missing "
        "ones for later runs",
    )
    cache_precision: Literal["float32", "fp16"] = Field(
        default="float32",
        description="of the latents in cache_dir; float32 gives the same losses as a run without a cache, fp16 takes "
        "half the space",
    )
    latent_sampling: Literal["random", "once", "deterministic"] = Field(
        default="random", validation_alias=also("latent_sampling", "latent_sampling_method")
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        places = ("instance_data_dir", "train_data_dir", "concepts_list", "sets")
        given = [name for name in places if getattr(self, name) is not None]
        if len(given) != 1:
            what = "no images are given" if not given else f"{' and '.join(given)} are both set"
            raise ValueError(
                f"{what}: set exactly one of instance_data_dir (one subject), train_data_dir (kohya folders "
                "or captioned images), concepts_list (several subjects), sets (several sets of any layout)"
            )
        for name in ("concepts_list", "sets"):
            if getattr(self, name) is None:
                continue
            if not getattr(self, name):
                one = "concept with instance_data_dir" if name == "concepts_list" else "set with source"
                raise ValueError(f"{name} is empty: list at least one {one}")
            for_one = ("instance_prompt", "class_data_dir", "class_prompt", "mask_dir")
            if extra := [other for other in for_one if getattr(self, other) is not None]:
                raise ValueError(f"{', '.join(extra)} together with {name}: set it in each entry instead")
        if self.instance_data_dir and self.class_data_dir and not self.class_prompt:
            raise ValueError(
                f"class_data_dir {self.class_data_dir!r} without class_prompt: set it to a description of its images, "
                "such as class_prompt: 'a photo of a dog'"
            )
        return self

    @model_validator(mode="after")
    def _weights_are_complete(self) -> Self:
        sets = [one for one in self.sets or () if not one.is_reg]
        if self.sets and not sets:
            raise ValueError("sets: every entry has is_reg: true; add a set of training images")
        weighted = [one for one in sets if one.weight is not None]
        if weighted and len(weighted) < len(sets):
            raise ValueError(
                "sets: some entries have a weight and others have none; give all a weight, or repeats"
            )
        if repeated := [one.source for one in weighted if one.repeats > 1]:
            raise ValueError(f"sets: {repeated[0]} has both weight and repeats; keep one")
        return self

    def for_set(self, options: SetOptions) -> DataConfig:
        """Return the section with the options that a set overrides."""
        return self.model_copy(update=changed) if (changed := options.overrides) else self

    @model_validator(mode="after")
    def _extensions_are_suffixes(self) -> Self:
        if not self.caption_extension:
            raise ValueError("caption_extension is empty: write '.txt', or use_captions: false")
        for extension in self.caption_extension:
            if not extension.startswith(".") or "/" in extension:
                raise ValueError(f"caption_extension {extension!r} is not a file extension: write '.txt'")
        return self

    @model_validator(mode="after")
    def _buckets_hold_the_resolution(self) -> Self:
        if not self.enable_bucket or self.bucket_no_upscale:
            return self
        if not self.min_bucket_reso <= self.resolution <= self.max_bucket_reso:
            raise ValueError(
                f"enable_bucket: resolution {self.resolution} is not between min_bucket_reso {self.min_bucket_reso} "
                f"and max_bucket_reso {self.max_bucket_reso}; set limits around it, such as half and twice of it"
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
        if not self.alpha_mask and (
            self.mask_dir or any(one.mask_dir for one in (*concepts, *(self.sets or ())))
        ):
            raise ValueError("mask_dir without alpha_mask: set alpha_mask: true, or remove mask_dir")
        return self

    @model_validator(mode="after")
    def _latents_can_be_kept(self) -> Self:
        if self.cache_resources is not None and self.cache != "while_training":
            raise ValueError(
                "cache_resources without cache: while_training: add it, or remove cache_resources"
            )
        if self.cache_dir is None:
            if self.cache == "while_training":
                raise ValueError(
                    "cache: while_training without cache_dir: set cache_dir to a folder or an s3:// address"
                )
            return self
        if not self.center_crop:
            raise ValueError(
                "cache_dir with center_crop: false: an image that is cropped differently at every use has no latents "
                "to cache; set center_crop: true (enable_bucket keeps aspect ratios), or remove cache_dir"
            )
        if not self.cache_latents:
            raise ValueError("cache_dir with cache_latents: false: remove one of them")
        return self
