"""The options of images in kohya-ss/sd-scripts, also in dataset configs, and what becomes of each."""

from __future__ import annotations

from dreamfleet.datasets.set_config import OVERRIDES
from dreamfleet.trainers.imports.programs.common import SPEED, as_suffixes, negated
from dreamfleet.trainers.imports.rules import Table, To, changes, ignored, joined, to

OWN = "a folder's own "  # before the name of an option that a folder has in place of the others'
DIFFERENT = "another folder's "  # before the name of an option that differs between image folders
_TAGS = "data.keep_tokens and data.tag_dropout have no such form"

# Options of images, in the training config, the command line, and (as datasets.*.NAME) the dataset config.
IMAGES: Table = {
    **to("data", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"),
    **to("data", "bucket_no_upscale", "keep_tokens", "caption_prefix", "caption_suffix"),
    "keep_tokens_separator": To("data.keep_tokens_separator", off=("",)),
    "shuffle_caption": To("data.shuffle_tags"),
    "caption_dropout_rate": To("data.caption_dropout"),
    "caption_tag_dropout_rate": To("data.tag_dropout"),
    "flip_aug": To("data.random_flip"),
    "random_crop": To("data.center_crop", negated),
    "caption_extension": To("data.caption_extension", as_suffixes),
    "caption_extention": To("data.caption_extension", as_suffixes),
    "alpha_mask": To("data.alpha_mask", note="weights have a mean of 1 here", off=(False,)),
    "masked_loss": To("data.alpha_mask", note="weights have a mean of 1 here", off=(False,)),
    "conditioning_data_dir": To("data.mask_dir"),
    **joined("w x h there, the side of a square here", "data.resolution", "resolution"),
    **joined("per device, as here", "train.train_batch_size", "batch_size"),
    **changes(
        "the whole caption is dropped with a probability only",
        "caption_dropout_every_n_epochs",
        "token_warmup_step",
    ),
    **changes(_TAGS, "secondary_separator", "enable_wildcard"),
    **changes(_TAGS, "caption_separator", off=(",",)),
    **changes(_TAGS, "token_warmup_min", off=(1,)),
    **changes("there is no such augmentation", "color_aug", "face_crop_aug_range", "resize_interpolation"),
    **changes("a folder of its own holds held-out images: validation.holdout", "validation_split"),
    **ignored(
        SPEED, "cache_info", "debug_dataset", "skip_cache_check", "validation_seed", "custom_attributes"
    ),
    **changes("is for training of ControlNets", "network_multiplier", off=(1, 1.0)),
}

# Options that a set of a recipe can have on its own.
OF_ONE_SET = tuple(
    name
    for name, rule in IMAGES.items()
    if isinstance(rule, To) and rule.key.removeprefix("data.") in OVERRIDES
)

SUBSETS: Table = {
    **{f"datasets.*.{key}": rule for key, rule in IMAGES.items()},
    **{f"datasets.*.subsets.*.{key}": rule for key, rule in IMAGES.items()},
    **{f"general.{key}": rule for key, rule in IMAGES.items()},
    **joined("a folder of images", "data.instance_data_dir", "datasets.*.subsets.*.image_dir"),
    **joined(
        "the prompt of images without caption", "data.instance_prompt", "datasets.*.subsets.*.class_tokens"
    ),
    **joined("uses of each image in an epoch", "data.repeats", "datasets.*.subsets.*.num_repeats"),
    **joined("class images", "data.class_data_dir", "datasets.*.subsets.*.is_reg"),
    **joined(
        "captions and tags, as there: metadata://FILE#FOLDER",
        "data.instance_data_dir",
        "datasets.*.subsets.*.metadata_file",
    ),
    **joined(
        "uses of each image in an epoch", "data.repeats", "general.num_repeats", "datasets.*.num_repeats"
    ),
    **joined("of the class images' loss", "method.prior_loss_weight", "datasets.*.prior_loss_weight"),
}
