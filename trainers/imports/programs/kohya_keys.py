"""The options of kohya-ss/sd-scripts and what becomes of each."""

from __future__ import annotations

from dreamfleet.trainers.imports.programs.common import (
    ATTENTION,
    SPEED,
    WEB,
    optimizer_name,
    trackers,
    yes_is,
)
from dreamfleet.trainers.imports.programs.kohya_image_keys import DIFFERENT, IMAGES, OWN, SUBSETS
from dreamfleet.trainers.imports.rules import (
    Effect,
    Gone,
    Joined,
    Table,
    To,
    blocks,
    changes,
    choice,
    ignored,
    joined,
    plain,
    to,
)

_BLOCKS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
_OTHER_MODEL = "is of models that are not trained here (SD 3, Flux and others)"
_MODEL: Table = {
    **to("model", "pretrained_model_name_or_path"),
    "vae": To("model.pretrained_vae_model_name_or_path", off=("",)),
    "v2": Gone(Effect.IGNORED, "the files of the model say which version it is", (False,)),
    "v_parameterization": To("model.prediction_type", yes_is("v_prediction"), off=(False,)),
    "zero_terminal_snr": To("model.rescale_betas_zero_snr"),
    **joined("counted from the last layer there, from the family's own here", "model.clip_skip", "clip_skip"),
    "max_token_length": To("model.max_token_length", plain),
    **ignored("tokenizers are part of the model", "tokenizer_cache_dir", "no_token_padding"),
}

_LENGTH: Table = {
    **joined("epochs take precedence there", "train.max_train_steps", "max_train_steps"),
    **joined(
        "steps of an epoch are rounded up for each bucket", "train.num_train_epochs", "max_train_epochs"
    ),
    **to("train", "gradient_accumulation_steps", "seed", "mixed_precision", "full_bf16"),
    **to("train", "gradient_checkpointing", "train_batch_size"),
    **changes("weights of 16 bits are bfloat16 here: train.full_bf16", "full_fp16"),
    **ignored(
        SPEED,
        "fp8_base",
        "fp8_base_unet",
        "cpu_offload_checkpointing",
        "blocks_to_swap",
        "lowram",
        "highvram",
    ),
    **ignored(
        "checkpoints and exports are settings of their own here", "save_last_n_epochs", "save_last_n_steps"
    ),
    **ignored("checkpoints always hold the whole state", "save_state", "save_state_on_train_end", "resume"),
    **ignored(
        "checkpoints always hold the whole state", "save_last_n_epochs_state", "save_last_n_steps_state"
    ),
    **ignored("checkpoints always hold the whole state", "skip_until_initial_step", "save_n_epoch_ratio"),
    **changes("a run starts at step 0 or at its checkpoint", "initial_epoch", "initial_step"),
    **joined(
        "one of steps and epochs", "train.checkpointing_steps", "save_every_n_steps", "save_every_n_epochs"
    ),
    "save_precision": To("train.save_precision", choice({"float": "fp32"})),
    **ignored("the usual formats are exported: train.export_formats", "save_model_as", "use_safetensors"),
    **ignored(WEB, "mem_eff_save", "no_metadata", "training_comment", "output_config", "config_file"),
}

_LOSS: Table = {
    "min_snr_gamma": To("train.snr_gamma", off=(0, 0.0)),
    "noise_offset": To("train.noise_offset", off=(0, 0.0)),
    "noise_offset_random_strength": To("train.noise_offset_random_strength", off=(False,)),
    "ip_noise_gamma": To("train.ip_noise_gamma", off=(0, 0.0)),
    "ip_noise_gamma_random_strength": To("train.ip_noise_gamma_random_strength", off=(False,)),
    "multires_noise_iterations": To("train.multires_noise_iterations", off=(0,)),
    **joined(
        "only with multires_noise_iterations", "train.multires_noise_discount", "multires_noise_discount"
    ),
    "min_timestep": To("train.min_timestep", off=(0,)),
    "max_timestep": To("train.max_timestep", off=(1000,)),
    "loss_type": To("train.loss_type", off=("l2",)),
    **joined("only with huber and smooth_l1", ("train.huber_schedule",), "huber_schedule"),
    **joined("only with huber and smooth_l1", ("train.huber_c",), "huber_c"),
    "huber_scale": To("train.huber_scale", off=(1, 1.0)),
    "debiased_estimation_loss": To("train.debiased_estimation_loss", off=(False,)),
    "scale_v_pred_loss_like_noise_pred": To("train.scale_v_pred_loss_like_noise_pred", off=(False,)),
    "v_pred_like_loss": To("train.v_pred_like_loss", off=(0, 0.0)),
    **changes("noise_offset has the same strength for all images", "adaptive_noise_scale"),
    **changes("emphasis in captions is not read: captions are plain text", "weighted_captions"),
    **ignored(_OTHER_MODEL, "weighting_scheme", "logit_mean", "logit_std", "mode_scale"),
    **joined("of the class images' loss", "method.prior_loss_weight", "prior_loss_weight"),
}

_OPTIMIZER: Table = {
    "optimizer_type": To("optimizer.name", optimizer_name),
    "use_8bit_adam": To("optimizer.name", yes_is("adamw8bit"), off=(False,)),
    "use_lion_optimizer": To("optimizer.name", yes_is("lion"), off=(False,)),
    "max_grad_norm": To("optimizer.max_grad_norm"),
    **joined(
        "k=v; AdamW's have keys of their own",
        (
            "optimizer.options",
            "optimizer.adam_weight_decay",
            "optimizer.adam_beta1",
            "optimizer.adam_epsilon",
        ),
        *("optimizer_args.weight_decay", "optimizer_args.betas", "optimizer_args.eps"),
    ),
    **joined("clips each parameter alone there", "optimizer.fused_backward", "fused_backward_pass"),
    **joined("of the U-Net unless unet_lr is given", "optimizer.learning_rate", "learning_rate", "unet_lr"),
    **joined(
        "of the text encoder",
        "optimizer.text_encoder_lr",
        "text_encoder_lr",
        "learning_rate_te",
        "learning_rate_te1",
    ),
    **joined("of SDXL's second text encoder", "optimizer.text_encoder_2_lr", "learning_rate_te2"),
    "lr_scheduler": To("optimizer.lr_scheduler"),
    "lr_scheduler_num_cycles": To("optimizer.lr_num_cycles"),
    "lr_scheduler_power": To("optimizer.lr_power"),
    **joined("a whole number of steps, or a share of them", "optimizer.lr_warmup_steps", "lr_warmup_steps"),
    **changes("there is no such schedule: optimizer.lr_scheduler", "lr_scheduler_type", "lr_scheduler_args"),
    **changes(
        "there is no such schedule: optimizer.lr_scheduler", "lr_decay_steps", "lr_scheduler_timescale"
    ),
    **changes("there is no such schedule: optimizer.lr_scheduler", "lr_scheduler_min_lr_ratio"),
    "block_lr": To("method.block_lr", off=("",)),
    **ignored(SPEED, "fused_optimizer_groups"),
}

LOKR_ARGS: Table = {
    "network_args.factor": To("method.lokr_factor", off=(-1,)),
    "network_args.decompose_both": To("method.lokr_decompose_both", off=(False,)),
    "network_args.full_matrix": To("method.lokr_full_matrix", off=(False,)),
}

_NETWORK: Table = {
    **joined("LoRA, or a module of LyCORIS", "method.lora_rank", "network_module"),
    **joined("LyCORIS's kind of LoRA: lokr, loha", "method.lora_type", "network_args.algo"),
    **joined("without it the rank is 4 there", "method.lora_rank", "network_dim"),
    **joined("scales by alpha / rank, as here; 1 there by default", "method.lora_alpha", "network_alpha"),
    **joined("trained unless switched off", "method.train_text_encoder", "network_train_unet_only"),
    **joined("a flag of fine_tune.py and sdxl_train.py", "method.train_text_encoder", "train_text_encoder"),
    **joined("-1 trains no text encoder", "method.train_text_encoder", "stop_text_encoder_training"),
    **joined("layers of the LoRA: locon", "method.lora_target_modules", "network_args.conv_dim"),
    **joined("as network_alpha, for convolutions", "method.lora_alpha", "network_args.conv_alpha"),
    "network_dropout": To("method.neuron_dropout", off=(0,)),
    "network_args.dropout": To("method.neuron_dropout", off=(0,)),
    "network_args.rank_dropout": To("method.rank_dropout", off=(0,)),
    "network_args.module_dropout": To("method.module_dropout", off=(0,)),
    **LOKR_ARGS,
    "network_args.dora_wd": To("method.use_dora", plain, off=(False,)),
    "scale_weight_norms": To("method.scale_weight_norms", off=(0,)),
    "network_args.loraplus_lr_ratio": To("method.loraplus_lr_ratio", off=(0,)),
    "network_args.loraplus_unet_lr_ratio": To("method.loraplus_unet_lr_ratio", off=(0,)),
    "network_args.loraplus_text_encoder_lr_ratio": To("method.loraplus_text_encoder_lr_ratio", off=(0,)),
    **{f"network_args.{name}": To(f"method.{name}", off=("",)) for name in _BLOCKS},
    **changes("the U-Net is always trained", "network_train_text_encoder_only"),
    **changes(
        "training starts from the base model", "network_weights", "base_weights", "base_weights_multiplier"
    ),
    **changes("training starts from the base model", "dim_from_weights"),
    **joined("the new word", "method.placeholder_token", "token_string"),
    **joined("text from whose vectors it starts", "method.initializer_token", "init_word"),
    "num_vectors_per_token": To("method.num_vectors"),
    "weights": To("method.initial_embedding"),
    "use_object_template": To("method.template_file", yes_is("object"), off=(False,)),
    "use_style_template": To("method.template_file", yes_is("style"), off=(False,)),
}

_REST: Table = {
    **joined("kohya's folders (10_sks cat), or a plain folder", "data.train_data_dir", "train_data_dir"),
    **joined("class images; none are generated", "data.class_data_dir", "reg_data_dir"),
    **joined("image folders", "data.sets", "dataset_config"),
    **joined("captions and tags, as there: metadata://FILE#FOLDER", "data.instance_data_dir", "in_json"),
    "dataset_repeats": To("data.repeats"),
    **joined(
        "sampled once when cached there", "data.latent_sampling", "cache_latents", "cache_latents_to_disk"
    ),
    **blocks("is a class of the program itself", "dataset_class"),
    **joined("folder and name together", "output_dir", "output_dir", "output_name"),
    **ignored(
        SPEED, "vae_batch_size", "max_data_loader_n_workers", "persistent_data_loader_workers", "no_half_vae"
    ),
    **ignored(
        SPEED, "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "text_encoder_batch_size"
    ),
    **ignored(SPEED, "disable_mmap_load_safetensors", "ddp_timeout", "ddp_gradient_as_bucket_view"),
    **ignored(SPEED, "ddp_static_graph", "diffusers_xformers", "highvram"),
    **ignored(ATTENTION, "xformers", "sdpa", "mem_eff_attn"),
    "torch_compile": To("engine.torch_compile"),
    "dynamo_backend": To("engine.dynamo_backend", off=("no", "inductor")),
    **joined("only with deepspeed", "engine.zero_stage", "deepspeed", "zero_stage"),
    "offload_optimizer_device": To("engine.offload_optimizer_device"),
    "offload_param_device": To("engine.offload_param_device"),
    "offload_optimizer_nvme_path": To("engine.nvme_path"),
    "offload_param_nvme_path": To("engine.nvme_path"),
    **ignored(SPEED, "zero3_init_flag", "zero3_save_16bit_model", "fp16_master_weights_and_gradients"),
    "sample_prompts": To("validation.prompts"),
    "sample_every_n_steps": To("validation.steps", off=(0,)),
    "sample_at_first": To("validation.sample_at_first"),
    "sample_sampler": To(
        "validation.scheduler",
        choice(
            {"ddim": "ddim", "euler_a": "euler_a", "k_euler_a": "euler_a", "dpmsolver++": "dpm++"},
            otherwise="previews have ddim, euler_a and dpm++",
            effect=Effect.IGNORED,
        ),
    ),
    **ignored("previews are counted in steps: validation.steps", "sample_every_n_epochs"),
    **ignored(
        "held-out images are a folder: validation.holdout",
        "validate_every_n_steps",
        "validate_every_n_epochs",
    ),
    **ignored("held-out images are a folder: validation.holdout", "max_validation_steps"),
    "log_with": To("report_to", trackers),
    "log_tracker_name": To("tracking.project"),
    **ignored(WEB, "logging_dir", "log_prefix", "wandb_run_name", "log_tracker_config", "log_config"),
    **ignored(
        WEB, "huggingface_repo_id", "huggingface_repo_type", "huggingface_path_in_repo", "async_upload"
    ),
    **ignored(WEB, "huggingface_repo_visibility", "save_state_to_huggingface", "resume_from_huggingface"),
    **ignored(WEB, "huggingface_token", "wandb_api_key"),
    "launcher.num_processes": To("scaling.num_workers"),
    **joined(
        "the launcher's, unless the script has its own", "train.mixed_precision", "launcher.mixed_precision"
    ),
}

RULES: Table = {**IMAGES, **_MODEL, **_LENGTH, **_LOSS, **_OPTIMIZER, **_NETWORK, **_REST, **SUBSETS}
PATTERNS: Table = {
    f"{OWN}*": Joined(("data.sets",), "an option of one image set"),
    f"{DIFFERENT}*": Gone(
        Effect.CHANGES, "options of images hold for all folders of a recipe; those of the first are used", ()
    ),
    "optimizer_args.*": Joined(("optimizer.options",), "options of the optimizer itself"),
    "network_args.*": Gone(Effect.CHANGES, "the LoRA has no such option here"),
    "metadata_*": Gone(Effect.IGNORED, WEB),
    "launcher.*": Gone(Effect.IGNORED, "Ray starts the workers: scaling", (True,)),
    "environment.*": Gone(Effect.IGNORED, "a variable of the shell, already filled in"),
    **{
        pattern: Gone(Effect.IGNORED, _OTHER_MODEL, (False, 0, 1))
        for pattern in (
            "t5xxl*",
            "clip_l*",
            "clip_g*",
            "ae",
            "*flow*",
            "*guidance_scale*",
            "apply_t5_attn_mask",
        )
    },
}
