"""The settings of Nerogar/OneTrainer and what becomes of each."""

from __future__ import annotations

from typing import Any

from dreamfleet.trainers.imports.programs.common import ATTENTION, SPEED, WEB, optimizer_name, yes_is
from dreamfleet.trainers.imports.programs.onetrainer_concept_keys import CONCEPT_PATTERNS, CONCEPTS
from dreamfleet.trainers.imports.rules import (
    Effect,
    Gone,
    Joined,
    Table,
    To,
    Untranslatable,
    blocks,
    changes,
    choice,
    ignored,
    joined,
    number,
)

_PRECISION = {"FLOAT_32": "no", "FLOAT_16": "fp16", "BFLOAT_16": "bf16", "TFLOAT_32": "no"}
_FORMAT = "the usual formats are exported: train.export_formats"
_OTHER = "is a part of models that are not trained here"


def _weights(value: Any) -> Any:
    """Return bf16 weights as full_bf16; float32 is the default here."""
    if value == "BFLOAT_16":
        return True
    if value in ("FLOAT_32", "NONE", "TFLOAT_32"):
        return None
    raise Untranslatable(Effect.IGNORED, "frozen weights have the precision of train.mixed_precision")


def _step_of(share: Any) -> int:
    """Return a noising strength, 0 to 1, as one of 1000 timesteps."""
    return round(number(share) * 1000)


def _is_never(unit: Any) -> bool:
    return str(unit) == "NEVER"


_TRAINING: Table = {
    **joined("the method", "method.name", "training_method"),
    **joined("the family follows from the model's files", "model", "model_type"),
    "base_model_name": To("model.pretrained_model_name_or_path"),
    "vae.model_name": To("model.pretrained_vae_model_name_or_path"),
    "force_v_prediction": To("model.prediction_type", yes_is("v_prediction"), off=(False,)),
    "force_epsilon_prediction": To("model.prediction_type", yes_is("epsilon"), off=(False,)),
    "rescale_noise_scheduler_to_zero_terminal_snr": To("model.rescale_betas_zero_snr"),
    **joined("counted from the family's own layer", "model.clip_skip", "text_encoder_layer_skip"),
    **changes("both text encoders skip the same layers: model.clip_skip", "text_encoder_2_layer_skip"),
    "epochs": To("train.num_train_epochs", note="steps of an epoch are rounded up for each bucket"),
    "batch_size": To("train.train_batch_size"),
    "gradient_accumulation_steps": To("train.gradient_accumulation_steps"),
    "train_dtype": To("train.mixed_precision", choice(_PRECISION, otherwise="there is no such precision")),
    **ignored("one precision is computed in", "fallback_train_dtype", "enable_autocast_cache", "loss_scaler"),
    **ignored(
        "loads and keeps weights in the precision of the run",
        "unet.weight_dtype",
        "text_encoder.weight_dtype",
    ),
    **ignored(
        "loads and keeps weights in the precision of the run",
        "text_encoder_2.weight_dtype",
        "vae.weight_dtype",
    ),
    **joined("one switch for all parts", "train.gradient_checkpointing", "unet.gradient_checkpointing"),
    **ignored("one switch for all parts: train.gradient_checkpointing", "gradient_checkpointing"),
    **ignored(SPEED, "text_encoder.gradient_checkpointing", "text_encoder_2.gradient_checkpointing"),
    "output_dtype": To(
        "train.save_precision", choice({"FLOAT_32": "fp32", "FLOAT_16": "fp16", "BFLOAT_16": "bf16"})
    ),
    **ignored(_FORMAT, "output_model_format", "include_train_config", "bundle_additional_embeddings"),
    **joined("the last part is the name of the artifacts", "output_dir", "output_model_destination"),
    "ema": To("engine.use_ema", lambda value: str(value) != "OFF", off=("OFF",)),
    **joined("only with ema", "engine.ema_decay", "ema_decay", "ema_update_step_interval"),
    "seed": To("train.seed"),
}

_LOSS: Table = {
    **joined("of formats before 3", "train.snr_gamma", "min_snr_gamma"),
    **joined(
        "min-SNR with its gamma, or another weight",
        "train.snr_gamma",
        "loss_weight_fn",
        "loss_weight_strength",
    ),
    **joined(
        "the mean square error; others are mixed there", "train.loss_type", "mse_strength", "mae_strength"
    ),
    **joined("mixed with the others there", "train.loss_type", "huber_strength", "huber_delta"),
    **changes("there is no such loss", "log_cosh_strength"),
    **ignored("only for models that predict a variance", "vb_loss_strength"),
    "offset_noise_weight": To("train.noise_offset", off=(0, 0.0)),
    **changes("the offset has the same strength at all timesteps", "generalized_offset_noise"),
    **changes(
        "noise is not scaled; train.ip_noise_gamma changes the input alone", "perturbation_noise_weight"
    ),
    "min_noising_strength": To(
        "train.min_timestep", _step_of, off=(0, 0.0), note="a share of 1000 timesteps there"
    ),
    "max_noising_strength": To(
        "train.max_timestep", _step_of, off=(1, 1.0), note="a share of 1000 timesteps there"
    ),
    "timestep_distribution": To(
        "train.timestep_sampling",
        choice(
            {"UNIFORM": "uniform", "LOGIT_NORMAL": "logit_normal", "COS_MAP": "cosmap"},
            otherwise="there is no such distribution of timesteps: train.timestep_sampling",
        ),
        off=("UNIFORM",),
    ),
    **joined("mean and width - 1, only for LOGIT_NORMAL", "train.logit_mean", "noising_bias"),
    **joined("mean and width - 1, only for LOGIT_NORMAL", "train.logit_std", "noising_weight"),
    **ignored("only for flow matching", "timestep_shift", "dynamic_timestep_shifting"),
    "masked_training": To(
        "data.alpha_mask", off=(False,), note="masks are NAME.mask.png here, NAME-masklabel.png there"
    ),
    **joined("weights have a mean of 1 here", "data.alpha_mask", "normalize_masked_area_loss"),
    **joined("only with masked_training", "data.alpha_mask", "unmasked_probability", "unmasked_weight"),
    **changes("there is no such loss", "masked_prior_preservation_weight", "custom_conditioning_image"),
}

_OPTIMIZER: Table = {
    "optimizer.optimizer": To("optimizer.name", optimizer_name),
    **joined(
        "AdamW's have keys of their own",
        (
            "optimizer.options",
            "optimizer.adam_weight_decay",
            "optimizer.adam_beta1",
            "optimizer.adam_epsilon",
        ),
        *("optimizer.weight_decay", "optimizer.beta1", "optimizer.beta2", "optimizer.eps"),
    ),
    **joined("nothing is clipped with it", "optimizer.fused_backward", "optimizer.fused_back_pass"),
    **ignored(
        SPEED, "optimizer.fused", "optimizer.foreach", "optimizer.capturable", "optimizer.differentiable"
    ),
    **ignored("weights of 16 bits are always rounded stochastically", "optimizer.stochastic_rounding"),
    **joined(
        "of parts without a rate of their own",
        "optimizer.learning_rate",
        "learning_rate",
        "unet.learning_rate",
    ),
    "text_encoder.learning_rate": To("optimizer.text_encoder_lr"),
    "text_encoder_2.learning_rate": To("optimizer.text_encoder_2_lr"),
    "embedding_learning_rate": To("optimizer.learning_rate"),
    **joined(
        "after a warmup, which constant has there too", "optimizer.lr_scheduler", "learning_rate_scheduler"
    ),
    **joined(
        "steps, or from 0 to 1 a share of them", "optimizer.lr_warmup_steps", "learning_rate_warmup_steps"
    ),
    "learning_rate_cycles": To("optimizer.lr_num_cycles"),
    **changes("schedules end at 0", "learning_rate_min_factor"),
    **joined("scaled by batch and accumulation", "optimizer.scale_lr", "learning_rate_scaler"),
    **changes("there is no such schedule: optimizer.lr_scheduler", "custom_learning_rate_scheduler"),
    **changes("there is no such schedule: optimizer.lr_scheduler", "scheduler_params"),
    "clip_grad_norm": To("optimizer.max_grad_norm"),
}

_METHOD: Table = {
    "lora_rank": To("method.lora_rank"),
    "lora_alpha": To("method.lora_alpha", note="scales by alpha / rank, as there"),
    "dropout_probability": To("method.neuron_dropout", off=(0, 0.0)),
    "lora_decompose": To("method.use_dora", off=(False,)),
    **ignored("only with lora_decompose", "lora_decompose_norm_epsilon", "lora_decompose_output_axis"),
    "peft_type": To(
        "method.lora_type", choice({"LORA": None, "LOHA": "loha", "LOKR": "lokr", "OFT_2": "oft"})
    ),
    **joined("the rank of a LoKr", "method.lora_rank", "lokr_dim"),
    "lokr_decompose_factor": To("method.lokr_factor", off=(-1,)),
    "lokr_decompose_both": To("method.lokr_decompose_both", off=(False,)),
    "lokr_full_matrix": To("method.lokr_full_matrix", off=(False,)),
    **changes("a LoKr has no such option here", "lokr_use_tucker", "lokr_weight_decompose"),
    **ignored("only with lokr_weight_decompose", "lokr_dora_on_output"),
    **ignored(SPEED, "lokr_vec_trick"),
    "lora_model_name": Gone(Effect.CHANGES, "training starts from the base model"),
    **ignored("trained parameters are kept in float32", "lora_weight_dtype", "embedding_weight_dtype"),
    **joined("layers of the LoRA", "method.lora_target_modules", "layer_filter", "layer_filter_preset"),
    **ignored("only with layer_filter", "layer_filter_regex"),
    **blocks("the U-Net is always trained", "unet.train", off=(True,)),
    **joined("both text encoders of SDXL at once", "method.train_text_encoder", "text_encoder.train"),
    **joined("both text encoders of SDXL at once", "method.train_text_encoder", "text_encoder_2.train"),
    **joined("the new word", "method.placeholder_token", "embedding.placeholder"),
    "embedding.token_count": To("method.num_vectors"),
    "embedding.initial_embedding_text": To("method.initializer_token"),
    "embedding.model_name": To("method.initial_embedding"),
    **changes("one word is trained", "additional_embeddings", "embedding.is_output_embedding"),
    **changes("there is no such option of embeddings", "preserve_embedding_norm"),
    **changes(
        "all parts are trained until the end", "unet.stop_training_after", "text_encoder.stop_training_after"
    ),
    **changes("all parts are trained until the end", "text_encoder_2.stop_training_after"),
    **changes("all parts are trained until the end", "embedding.stop_training_after"),
    "text_encoder.dropout_probability": To("data.caption_dropout", off=(0, 0.0)),
    "text_encoder_2.dropout_probability": To("data.caption_dropout", off=(0, 0.0)),
}

RULES: Table = {
    **_TRAINING,
    **_LOSS,
    **_OPTIMIZER,
    **_METHOD,
    **CONCEPTS,
    **ignored(SPEED, "attention_mechanism", "compile", "dataloader_threads", "train_device", "temp_device"),
    **ignored(
        SPEED, "async_offloading", "layer_offload_fraction", "enable_async_offloading", "device_indexes"
    ),
    **ignored(
        SPEED, "multi_gpu", "gradient_reduce_precision", "fused_gradient_reduce", "async_gradient_reduce"
    ),
    **ignored(SPEED, "async_gradient_reduce_buffer", "offline_mode", "enable_activation_offloading"),
    **ignored(
        WEB, "workspace_dir", "cache_dir", "huggingface_cache_dir", "debug_mode", "debug_dir", "tensorboard"
    ),
    **ignored(WEB, "tensorboard_expose", "tensorboard_always_on", "tensorboard_port", "prevent_overwrites"),
    **ignored(
        WEB, "samples_to_tensorboard", "sample_image_format", "sample_video_format", "sample_audio_format"
    ),
    **ignored(WEB, "non_ema_sampling", "rolling_backup", "backup_before_save", "continue_last_backup"),
    **ignored(WEB, "embedding.uuid", "embedding.train", "embedding.stop_training_after_unit"),
    **ignored(ATTENTION, "attention_mask"),
    **changes("convolutions pad with zeros", "force_circular_padding"),
    **blocks("only fills the cache: dreamfleet data cache", "only_cache"),
    **joined("newer versions are reported", "train", "__version"),
    **ignored("only for video and audio", "frames"),
}
PATTERNS: Table = {
    **{
        f"{part}.*": Gone(Effect.IGNORED, _OTHER, (True, False, 0, 1))
        for part in ("prior", "transformer", "unconditional_transformer", "quantization", "text_encoder_3")
    },
    **{
        f"{part}*": Gone(Effect.IGNORED, _OTHER, (True, False, 0, 1))
        for part in ("text_encoder_3", "text_encoder_4", "effnet_encoder", "decoder", "oft_")
    },
    "text_encoder_sequence_length": Gone(Effect.IGNORED, _OTHER),
    "text_encoder_2_sequence_length": Gone(Effect.IGNORED, _OTHER),
    "*.include": Gone(Effect.IGNORED, "is a part of the model", (True, False)),
    "*.stop_training_after_unit": Gone(Effect.IGNORED, "only with stop_training_after"),
    **{
        f"{part}.*": Gone(Effect.IGNORED, "is at its default, or concerns other models", (True, False, 0, 1))
        for part in ("unet", "text_encoder", "text_encoder_2", "vae", "embedding")
    },
    "optimizer.*": Joined(("optimizer.options",), "options of the optimizer itself"),
    "optimizer_defaults*": Gone(Effect.IGNORED, "values of optimizers that are not in use", (True, False, 0)),
    **CONCEPT_PATTERNS,
    "cloud.*": Gone(Effect.IGNORED, "machines are Ray's: scaling", (False, 0)),
    "secrets.*": Gone(Effect.IGNORED, WEB),
}
