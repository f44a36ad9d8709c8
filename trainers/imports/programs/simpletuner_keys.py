"""The settings of SimpleTuner and what becomes of each."""

from __future__ import annotations

from dreamfleet.trainers.imports.programs.common import (
    ATTENTION,
    SPEED,
    WEB,
    negated,
    optimizer_name,
    trackers,
)
from dreamfleet.trainers.imports.rules import (
    Effect,
    Gone,
    Table,
    To,
    blocks,
    changes,
    choice,
    ignored,
    joined,
    to,
)

_OTHER = "is for other kinds of models"
_FLOW = "only for flow matching"
_CACHE = "latents are cached by content: data.cache_dir"

RULES: Table = {
    **joined("Stable Diffusion 1.x, 2.x and XL", "model", "model_family", "model_flavour"),
    **joined("lora or full", "method.lora_rank", "model_type"),
    **joined("standard, or lycoris with a file", "method.lora_type", "lora_type", "lycoris_config"),
    **joined("the kind of LoRA, lokr or loha", "method.lora_type", "lycoris.algo"),
    **joined("the rank", "method.lora_rank", "lycoris.linear_dim"),
    **joined("scales by alpha / rank, as here", "method.lora_alpha", "lycoris.linear_alpha"),
    "lycoris.factor": To("method.lokr_factor", off=(-1,)),
    "lycoris.decompose_both": To("method.lokr_decompose_both", off=(False,)),
    "lycoris.full_matrix": To("method.lokr_full_matrix", off=(False,)),
    "lycoris.module_dropout": To("method.module_dropout", off=(0, 0.0)),
    **changes("a LoRA is trained at strength 1", "lycoris.multiplier", off=(1, 1.0)),
    **to(
        "model", "pretrained_model_name_or_path", "revision", "variant", "pretrained_vae_model_name_or_path"
    ),
    **to("model", "prediction_type", "rescale_betas_zero_snr"),
    **joined("pixels or megapixels, by resolution_type", "data.resolution", "resolution", "resolution_type"),
    **joined("the folders of images", "data.sets", "data_backend_config"),
    "caption_dropout_probability": To("data.caption_dropout"),
    **joined("steps take precedence", "train.max_train_steps", "max_train_steps", "num_train_epochs"),
    **to("train", "train_batch_size", "gradient_accumulation_steps", "seed", "mixed_precision"),
    **to("train", "gradient_checkpointing", "snr_gamma", "checkpoints_total_limit"),
    "checkpoint_step_interval": To("train.checkpointing_steps"),
    "checkpointing_steps": To("train.checkpointing_steps"),
    "checkpoint_epoch_interval": To("train.save_every_n_epochs"),
    **joined("a switch and a strength there", "train.noise_offset", "offset_noise", "noise_offset"),
    **joined("every image gets it here", "train.noise_offset", "noise_offset_probability"),
    "input_perturbation": To("train.ip_noise_gamma", off=(0, 0.0)),
    **changes("the strength is the same at every step", "input_perturbation_steps"),
    "loss_type": To("train.loss_type", off=("l2",)),
    **joined("only with huber and smooth_l1", "train.huber_c", "huber_c", "huber_schedule"),
    **changes("there is no such weight of the loss", "snr_weight", off=(1, 1.0)),
    **changes("there is no such weight of the loss", "soft_min_snr_sigma_data"),
    **changes("masks are always used: data.alpha_mask", "masked_loss_probability", off=(1, 1.0)),
    "timestep_bias_strategy": To("train.timestep_sampling", off=("none",)),
    **to("train", *(f"timestep_bias_{name}" for name in ("begin", "end", "multiplier", "portion"))),
    **ignored("timesteps are uniform on average in both", "disable_segmented_timestep_sampling"),
    **to("method", "lora_rank", "lora_dropout", "train_text_encoder"),
    **joined("the rank by default, as here", "method.lora_alpha", "lora_alpha"),
    "peft_lora_target_modules": To("method.lora_target_modules"),
    "use_dora": To("method.use_dora", off=(False,)),
    **changes(
        "training starts from the base model", "init_lora", "assistant_lora_path", "slider_lora_target"
    ),
    **changes("LoRA matrices start as usual", "lora_init_type", off=("default",)),
    **changes("there is no such LoRA", "peft_lora_mode", off=("standard",)),
    **changes("the whole U-Net is trained", "layer_freeze_strategy"),
    "optimizer": To("optimizer.name", optimizer_name),
    **to("optimizer", "learning_rate", "text_encoder_lr", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles"),
    **to(
        "optimizer",
        "lr_power",
        "adam_beta1",
        "adam_beta2",
        "adam_weight_decay",
        "adam_epsilon",
        "max_grad_norm",
    ),
    "optimizer_beta1": To("optimizer.adam_beta1"),
    "optimizer_beta2": To("optimizer.adam_beta2"),
    "lr_scale": To("optimizer.scale_lr", off=(False,)),
    **changes("schedules end at 0", "lr_end"),
    **changes("the rate is multiplied by the batch, not by its root", "lr_scale_sqrt"),
    **changes("the optimizer has no such option here", "optimizer_config", "prodigy_steps"),
    **joined("values there, their norm here", "optimizer.max_grad_norm", "grad_clip_method"),
    **to("engine", "use_ema", "ema_decay"),
    "disable_tf32": To("engine.allow_tf32", negated),
    "deepspeed_config": To("engine.deepspeed_config"),
    "num_processes": To("scaling.num_workers"),
    "validation_prompt": To("validation.prompts"),
    "validation_negative_prompt": To("validation.negative_prompt"),
    "validation_steps": To("validation.steps"),
    "validation_step_interval": To("validation.steps"),
    "validation_seed": To("validation.seed"),
    "validation_guidance": To("validation.guidance_scale"),
    "validation_num_inference_steps": To("validation.num_inference_steps"),
    "num_validation_images": To("validation.num_images"),
    **ignored("previews have the size of the images", "validation_resolution"),
    **ignored("previews are of validation.prompts", "validation_prompt_library", "user_prompt_library"),
    **joined("the last part is the name of the artifacts", "output_dir", "output_dir"),
    "report_to": To("report_to", trackers),
    "tracker_project_name": To("tracking.project"),
    **blocks("trains something else than the U-Net", "controlnet", "control", "refiner_training"),
    **changes("frozen weights keep their precision", "base_model_precision", off=("no_change",)),
    **ignored(ATTENTION, "attention_mechanism", "unet_attention_slice"),
    **ignored(
        "checkpoints and their names are this program's own", "resume_from_checkpoint", "save_text_encoder"
    ),
    **ignored(
        "images of all sizes are used", "disable_bucket_pruning", "minimum_image_size", "maximum_image_size"
    ),
    **ignored("sides of buckets are multiples of data.bucket_reso_steps", "aspect_bucket_rounding"),
    "aspect_bucket_alignment": To("data.bucket_reso_steps"),
    **changes("every file beside the image: data.caption_extension", "caption_strategy", off=("textfile",)),
    "instance_prompt": To("data.instance_prompt"),
    **ignored(SPEED, "vae_batch_size", "write_batch_size", "read_batch_size", "image_processing_batch_size"),
    **ignored(
        SPEED,
        "delete_problematic_images",
        "i_know_what_i_am_doing",
        "disable_benchmark",
        "compress_disk_cache",
    ),
    **ignored(
        SPEED, "set_grads_to_none", "dataloader_prefetch", "max_workers", "torch_num_threads", "vae_dtype"
    ),
    **ignored(
        SPEED, "allow_dataset_oversubscription", "preserve_data_backend_cache", "override_dataset_config"
    ),
    **ignored(
        SPEED, "gradient_precision", "fuse_optimizer", "optimizer_release_gradients", "seed_for_each_device"
    ),
    **ignored(SPEED, "keep_vae_loaded", "base_model_default_dtype", "skip_file_discovery", "webhook_config"),
    **ignored(
        WEB, "push_to_hub", "push_checkpoints_to_hub", "hub_model_id", "tracker_run_name", "logging_dir"
    ),
    "backends.*.caption_dropout": To("data.caption_dropout"),
    **joined("a folder, a bucket or the hub", "data.instance_data_dir", "backends.*.id", "backends.*.type"),
    **joined("a folder, a bucket or the hub", "data.instance_data_dir", "backends.*.instance_data_dir"),
    **joined("a folder, a bucket or the hub", "data.instance_data_dir", "backends.*.dataset_name"),
    **joined("a folder, a bucket or the hub", "data.instance_data_dir", "backends.*.aws_bucket_name"),
    **joined("a folder, a bucket or the hub", "data.instance_data_dir", "backends.*.aws_data_prefix"),
    **joined("images alone", "data.instance_data_dir", "backends.*.dataset_type", "backends.*.disabled"),
    **joined("uses beyond the first there, all uses here", "data.repeats", "backends.*.repeats"),
    **joined("files, names or one prompt", "data.use_captions", "backends.*.caption_strategy"),
    **joined("files, names or one prompt", "data.instance_prompt", "backends.*.instance_prompt"),
    **joined("files, names or one prompt", "data.instance_prompt", "backends.*.only_instance_prompt"),
    **joined("class images", "data.class_data_dir", "backends.*.is_regularisation_data"),
    **joined(
        "pixels or megapixels", "data.resolution", "backends.*.resolution", "backends.*.resolution_type"
    ),
    **joined("crops, or buckets without", "data.enable_bucket", "backends.*.crop"),
    "backends.*.crop_style": To(
        "data.center_crop",
        choice({"center": True, "centre": True, "random": False}, otherwise="crops are centred or random"),
    ),
    **changes(
        "crops are squares, or buckets with data.enable_bucket", "backends.*.crop_aspect", off=("square",)
    ),
    **changes("crops are squares, or buckets with data.enable_bucket", "backends.*.crop_aspect_buckets"),
    **changes("each image counts as often as its repeats say", "backends.*.probability", off=(1, 1.0)),
    **ignored(
        "images of all sizes are used", "backends.*.minimum_image_size", "backends.*.maximum_image_size"
    ),
    **ignored("images are resized once", "backends.*.target_downsample_size"),
    **ignored(
        _CACHE, "backends.*.cache_dir_vae", "backends.*.cache_dir", "backends.*.vae_cache_clear_each_epoch"
    ),
    **ignored(
        _CACHE, "cache_dir", "cache_dir_vae", "cache_dir_text", "vae_cache_ondemand", "vae_cache_disable"
    ),
}
PATTERNS: Table = {
    "backends.*": Gone(Effect.IGNORED, "how the program scans and caches", (False, 0)),
    "lycoris.*": Gone(Effect.CHANGES, "the LoRA has no such option here", (False,)),
    "flow_*": Gone(Effect.IGNORED, _FLOW, (False,)),
    "_metadata*": Gone(Effect.IGNORED, WEB, (False,)),
    "validation_*": Gone(Effect.IGNORED, "previews have their own settings: validation", (False, 0, 0.0)),
    "dynamo_*": Gone(Effect.IGNORED, SPEED, (False, "no")),
    "hub_*": Gone(Effect.IGNORED, WEB),
    "model_card_*": Gone(Effect.IGNORED, WEB),
    "tracker_*": Gone(Effect.IGNORED, WEB),
    "accelerate_*": Gone(Effect.IGNORED, "Ray starts the workers: scaling"),
    "offload_*": Gone(Effect.IGNORED, SPEED, (False,)),
    "quantize_*": Gone(Effect.IGNORED, SPEED, (False,)),
    "*_batch_size": Gone(Effect.IGNORED, SPEED),
    "*_cache*": Gone(Effect.IGNORED, SPEED, (False,)),
    **{
        f"{prefix}_*": Gone(Effect.CHANGES, _OTHER, (False, 0, 0.0, 1))
        for prefix in (
            "tread",
            "crepa",
            "layersync",
            "urepa",
            "irepa",
            "nextlat",
            "twinflow",
            "internal_guidance",
        )
    },
}
