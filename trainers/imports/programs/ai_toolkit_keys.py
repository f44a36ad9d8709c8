"""The settings of ostris/ai-toolkit (of the first process) and what becomes of each."""

from __future__ import annotations

from dreamfleet.trainers.imports.programs.common import (
    ATTENTION,
    SPEED,
    WEB,
    as_suffixes,
    optimizer_name,
    yes_is,
)
from dreamfleet.trainers.imports.rules import (
    Effect,
    Gone,
    Joined,
    Table,
    To,
    changes,
    choice,
    ignored,
    joined,
)

_TYPES = {"fp32": "no", "float32": "no", "float": "no", "fp16": "fp16", "float16": "fp16", "bf16": "bf16"}
_SAVED = {"float32": "fp32", "float": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_LOSS = "there is no such loss or noise"
_SET = "there is no such option of images"

RULES: Table = {
    **joined("the last part of output_dir", "output_dir", "name", "training_folder"),
    **joined("the trainer", "method.name", "type"),
    **joined("put into captions there", "data.caption_prefix", "trigger_word"),
    **changes("one process is imported, the first", "more_processes"),
    **joined("lora", "method.lora_rank", "network.type", "network.linear", "network.rank"),
    **joined(
        "scales by alpha / rank, as here; 1 by default there", "method.lora_alpha", "network.linear_alpha"
    ),
    **joined("scales by alpha / rank, as here; 1 by default there", "method.lora_alpha", "network.alpha"),
    **joined("layers of the LoRA: locon", "method.lora_target_modules", "network.conv", "network.conv_alpha"),
    "network.dropout": To("method.neuron_dropout", off=(0, 0.0)),
    **changes("training starts from the base model", "network.pretrained_lora_path"),
    **ignored("is the same for the U-Net", "network.transformer_only"),
    **joined("whole matrices, on by default there", "method.lokr_full_matrix", "network.lokr_full_rank"),
    "network.lokr_factor": To("method.lokr_factor", off=(-1,)),
    **ignored("the names of keys in the file", "network.old_lokr_format"),
    **joined("the new word", "method.placeholder_token", "embedding.trigger"),
    "embedding.tokens": To("method.num_vectors"),
    "embedding.init_words": To("method.initializer_token"),
    "save.dtype": To("train.save_precision", choice(_SAVED)),
    "save.save_every": To("train.checkpointing_steps"),
    "save.max_step_saves_to_keep": To("train.checkpoints_total_limit"),
    **ignored(
        WEB,
        "save.save_format",
        "save.push_to_hub",
        "save.hf_repo_id",
        "save.hf_private",
        "embedding.save_format",
    ),
    **joined("folders of images", "data.sets", "datasets.*.folder_path", "datasets.*.is_reg"),
    **joined("uses of each image in an epoch", "data.repeats", "datasets.*.num_repeats"),
    **joined("several sizes at once there", "data.resolution", "datasets.*.resolution"),
    **joined("on by default there", "data.enable_bucket", "datasets.*.buckets"),
    **joined("of images without a caption", "data.instance_prompt", "datasets.*.default_caption"),
    "datasets.*.caption_ext": To("data.caption_extension", as_suffixes),
    "datasets.*.caption_dropout_rate": To("data.caption_dropout"),
    "datasets.*.token_dropout_rate": To("data.tag_dropout"),
    "datasets.*.shuffle_tokens": To("data.shuffle_tags"),
    "datasets.*.keep_tokens": To("data.keep_tokens"),
    "datasets.*.flip_x": To("data.random_flip"),
    "datasets.*.bucket_tolerance": To("data.bucket_reso_steps"),
    "datasets.*.alpha_mask": To("data.alpha_mask", off=(False,)),
    **joined("masks beside the images", "data.mask_dir", "datasets.*.mask_path"),
    **ignored(
        SPEED, "datasets.*.cache_latents_to_disk", "datasets.*.cache_latents", "datasets.*.num_workers"
    ),
    **ignored(SPEED, "datasets.*.prefetch_factor", "datasets.*.cache_text_embeddings"),
    **changes(
        "all folders weigh the same", "datasets.*.network_weight", "datasets.*.loss_multiplier", off=(1, 1.0)
    ),
    **joined("batches there, optimizer steps here", "train.max_train_steps", "train.steps"),
    "train.batch_size": To("train.train_batch_size"),
    **joined(
        "two keys there, multiplied", "train.gradient_accumulation_steps", "train.gradient_accumulation_steps"
    ),
    **joined(
        "two keys there, multiplied", "train.gradient_accumulation_steps", "train.gradient_accumulation"
    ),
    "train.gradient_checkpointing": To("train.gradient_checkpointing"),
    "train.dtype": To("train.mixed_precision", choice(_TYPES, otherwise="there is no such precision")),
    "train.train_text_encoder": To("method.train_text_encoder"),
    **changes("the U-Net is always trained", "train.train_unet", off=(True,)),
    "train.seed": To("train.seed"),
    "train.optimizer": To("optimizer.name", optimizer_name),
    **joined("of the U-Net unless unet_lr is given", "optimizer.learning_rate", "train.lr", "train.unet_lr"),
    "train.text_encoder_lr": To("optimizer.text_encoder_lr"),
    "train.embedding_lr": To("optimizer.learning_rate"),
    "train.lr_scheduler": To("optimizer.lr_scheduler"),
    "train.max_grad_norm": To("optimizer.max_grad_norm"),
    "train.min_snr_gamma": To("train.snr_gamma", off=(0, 0.0)),
    "train.snr_gamma": To("train.snr_gamma", off=(0, 0.0), note="a fixed weight there, min-SNR here"),
    "train.noise_offset": To("train.noise_offset"),
    "train.min_denoising_steps": To("train.min_timestep", off=(0,)),
    "train.max_denoising_steps": To("train.max_timestep", off=(999, 1000)),
    "train.loss_type": To("train.loss_type", choice({"mse": "l2", "mae": "l1"}), off=("mse",)),
    "train.reg_weight": To("method.prior_loss_weight"),
    "train.prompt_dropout_prob": To("data.caption_dropout", off=(0, 0.0)),
    "train.ema_config.use_ema": To("engine.use_ema"),
    "train.ema_config.ema_decay": To("engine.ema_decay"),
    **changes("timesteps are uniform", "train.content_or_style", off=("balanced",)),
    **ignored("timesteps are uniform in DDPM", "train.timestep_type", "train.linear_timesteps"),
    **ignored("the noise schedule is the model's own", "train.noise_scheduler"),
    **ignored(ATTENTION, "train.xformers", "train.sdp", "train.attention_backend"),
    **ignored(SPEED, "train.unload_text_encoder", "train.cache_text_embeddings"),
    **joined("previews need prompts", "validation.prompts", "train.disable_sampling", "sample.prompts"),
    **joined("previews need prompts", "validation.prompts", "sample.samples.*.prompt"),
    "train.skip_first_sample": To("validation.sample_at_first", yes_is(False), off=(False,)),
    **ignored("previews only", "train.force_first_sample"),
    "model.name_or_path": To("model.pretrained_model_name_or_path"),
    "model.vae_path": To("model.pretrained_vae_model_name_or_path"),
    "model.is_v_pred": To("model.prediction_type", yes_is("v_prediction"), off=(False,)),
    **joined(
        "the family follows from the model's files", "model", "model.arch", "model.is_v2", "model.is_xl"
    ),
    **ignored(SPEED, "model.quantize", "model.quantize_te", "model.low_vram", "model.dtype", "model.qtype"),
    "sample.sample_every": To("validation.steps"),
    "sample.seed": To("validation.seed"),
    "sample.neg": To("validation.negative_prompt", off=(False,)),
    "sample.guidance_scale": To("validation.guidance_scale"),
    "sample.sample_steps": To("validation.num_inference_steps"),
    "logging.log_every": To("train.log_steps"),
    "logging.use_wandb": To("report_to", yes_is(["tensorboard", "wandb"]), off=(False,)),
    "logging.project_name": To("tracking.project"),
    **ignored(WEB, "device", "log_dir", "performance_log_every", "logging.verbose", "logging.run_name"),
    **ignored(WEB, "sqlite_db_path", "logging.use_ui_logger"),
}
PATTERNS: Table = {
    "sample.*": Gone(Effect.IGNORED, "previews have their own settings: validation", (False, 0, 1)),
    "datasets.*": Gone(Effect.CHANGES, _SET, (False, 0, 0.0, 1)),
    "model.*": Gone(Effect.CHANGES, "the model has no such option", (False,)),
    "network.network_kwargs.*": Gone(Effect.CHANGES, "write layers in method.lora_target_modules"),
    "network.*": Gone(Effect.CHANGES, "the LoRA has no such option here", (False, -1)),
    "train.optimizer_params.*": Joined(("optimizer.options",), "options of the optimizer itself"),
    "train.lr_scheduler_params.*": Gone(Effect.CHANGES, "the schedule has no such option here"),
    "train.ema_config.*": Gone(Effect.CHANGES, "the average has no such option here", (False, 1)),
    "train.*": Gone(Effect.CHANGES, _LOSS, (False, 0, 0.0)),
    "adapter*": Gone(Effect.BLOCKS, "adapters for images are not trained"),
    "slider*": Gone(Effect.BLOCKS, "sliders are not trained"),
    "meta*": Gone(Effect.IGNORED, WEB),
    "performance*": Gone(Effect.IGNORED, WEB),
}
