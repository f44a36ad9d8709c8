"""The settings of OneTrainer's concepts and samples, and what becomes of each."""

from __future__ import annotations

from dreamfleet.trainers.imports.programs.common import WEB
from dreamfleet.trainers.imports.rules import Effect, Gone, Table, To, changes, ignored, joined

_VARIED = "there is no such change of images or captions"

CONCEPTS: Table = {
    **joined("a folder of images", "data.instance_data_dir", "concepts.*.path", "concepts.*.enabled"),
    **joined(
        "uses of each image in an epoch",
        "data.repeats",
        "concepts.*.balancing",
        "concepts.*.balancing_strategy",
    ),
    **joined("uses of each image in an epoch", "data.repeats", "concepts.*.repeats"),
    **joined(
        "a file beside the image, its name, or one prompt",
        "data.use_captions",
        "concepts.*.text.prompt_source",
    ),
    **joined("the prompt of all images", "data.instance_prompt", "concepts.*.text.prompt_path"),
    **joined(
        "held-out images are a folder",
        "validation.holdout",
        "concepts.*.type",
        "concepts.*.validation_concept",
    ),
    "concepts.*.image.enable_crop_jitter": Gone(
        Effect.CHANGES, "crops at the centre here; that program shifts them by some pixels", (False, None)
    ),
    "concepts.*.image.enable_random_flip": To("data.random_flip"),
    "concepts.*.text.enable_tag_shuffling": To("data.shuffle_tags"),
    "concepts.*.text.keep_tags_count": To("data.keep_tokens", off=(0,)),
    "concepts.*.text.tag_dropout_probability": To("data.tag_dropout", off=(0, 0.0)),
    **joined("each tag has the same chance", "data.tag_dropout", "concepts.*.text.tag_dropout_enable"),
    **changes("tags are separated by commas", "concepts.*.text.tag_delimiter", off=(",",)),
    **changes("all folders weigh the same", "concepts.*.loss_weight", off=(1, 1.0)),
    **changes("subfolders are always included", "concepts.*.include_subdirectories", off=(True,)),
    **ignored("is drawn anew at each use", "concepts.*.image_variations", "concepts.*.text_variations"),
    **ignored(WEB, "concepts.*.name", "concepts.*.seed", "concepts.*.concept_stats", "concepts.*.__version"),
    "aspect_ratio_bucketing": To(
        "data.enable_bucket", note="buckets of resolution squared pixels, steps of 64"
    ),
    **joined("the side of a square", "data.resolution", "resolution"),
    **ignored(
        "latents are always cached unless images vary", "latent_caching", "clear_cache_before_training"
    ),
    **joined("files with the concepts and samples", "data.sets", "concept_file_name"),
    **joined("prompts of previews", "validation.prompts", "samples.*.prompt", "sample_definition_file_name"),
    "samples.*.negative_prompt": To("validation.negative_prompt"),
    "samples.*.diffusion_steps": To("validation.num_inference_steps"),
    "samples.*.cfg_scale": To("validation.guidance_scale"),
    "samples.*.seed": To("validation.seed"),
    **joined("steps alone count here", "validation.steps", "sample_after", "sample_after_unit"),
    **joined("steps alone count here", "train.checkpointing_steps", "backup_after", "backup_after_unit"),
    **ignored("exports are written at the end", "save_every", "save_every_unit", "save_skip_first"),
    **ignored(
        "exports are written at the end", "save_filename_prefix", "sample_skip_first", "validate_after"
    ),
    **ignored("exports are written at the end", "validate_after_unit", "validation"),
    "rolling_backup_count": To("train.checkpoints_total_limit"),
}


CONCEPT_PATTERNS: Table = {
    "concepts.*.image.*_strength": Gone(Effect.CHANGES, _VARIED, (0, 0.0)),
    "concepts.*.image.*_angle": Gone(Effect.CHANGES, _VARIED, (0, 0.0)),
    "concepts.*.image.resolution_override": Gone(Effect.IGNORED, "only with enable_resolution_override"),
    "concepts.*.image.*": Gone(Effect.CHANGES, _VARIED, (False, None)),
    "concepts.*.text.caps_randomize_mode": Gone(Effect.IGNORED, "only with caps_randomize_enable"),
    "concepts.*.text.tag_dropout_*": Gone(Effect.CHANGES, _VARIED, (False, "FULL", "NONE", "")),
    "concepts.*.text.*": Gone(Effect.CHANGES, _VARIED, (False, 0, 0.0)),
    "concepts.*": Gone(Effect.IGNORED, "figures of the folder that the program shows", ()),
    "samples.*": Gone(Effect.IGNORED, "previews have one size and sampler for all prompts", (False, 0, 1)),
}
