"""Imports command lines of the training scripts in huggingface/diffusers (`examples/`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dreamfleet.trainers.imports.draft import Draft
from dreamfleet.trainers.imports.importer import Importer
from dreamfleet.trainers.imports.programs.common import (
    ATTENTION,
    SPEED,
    WEB,
    optimizer_name,
    put_length,
    refuse_family,
    trackers,
    yes_is,
)
from dreamfleet.trainers.imports.rules import (
    Effect,
    Gone,
    Table,
    To,
    changes,
    ignored,
    joined,
    number,
    plain,
    to,
)
from dreamfleet.trainers.imports.settings import Document, Settings

SCRIPTS: Mapping[str, str] = {
    "train_dreambooth": "dreambooth",
    "train_dreambooth_lora": "dreambooth",
    "train_dreambooth_lora_sdxl": "dreambooth",
    "train_dreambooth_lora_sd15_advanced": "dreambooth",
    "train_dreambooth_lora_sdxl_advanced": "dreambooth",
    "train_text_to_image": "native",
    "train_text_to_image_lora": "native",
    "train_text_to_image_sdxl": "native",
    "train_text_to_image_lora_sdxl": "native",
    "textual_inversion": "textual_inversion",
    "textual_inversion_sdxl": "textual_inversion",
}
_HUB_DATA = (
    "datasets of the hub are not read by name: download it, and give its folder as data.train_data_dir"
)

RULES: Table = {
    **to(
        "model", "pretrained_model_name_or_path", "revision", "variant", "pretrained_vae_model_name_or_path"
    ),
    "prediction_type": To("model.prediction_type"),
    **to("data", "instance_data_dir", "class_data_dir", "class_prompt", "train_data_dir"),
    **to("data", "resolution", "random_flip", "caption_column", "repeats"),
    **joined("the prompt of every image, also of captioned ones", "data.instance_prompt", "instance_prompt"),
    "center_crop": To("data.center_crop", note="crops at random places unless it is set"),
    "proportion_empty_prompts": To("data.caption_dropout"),
    **to("method", "with_prior_preservation", "prior_loss_weight", "num_class_images", "sample_batch_size"),
    **to("method", "train_text_encoder", "placeholder_token", "num_vectors", "learnable_property"),
    "initializer_token": To("method.initializer_token"),
    **joined("alpha is the rank, as here", "method.lora_rank", "rank"),
    "lora_dropout": To("method.lora_dropout"),
    "use_dora": To("method.use_dora", off=(False,)),
    **joined("steps take precedence", "train.max_train_steps", "max_train_steps", "num_train_epochs"),
    "train_batch_size": To(
        "train.train_batch_size", note="of each worker, as there; class images come on top"
    ),
    **to(
        "train", "gradient_accumulation_steps", "seed", "gradient_checkpointing", "snr_gamma", "noise_offset"
    ),
    **joined(
        "the launcher's without it", "train.mixed_precision", "mixed_precision", "launcher.mixed_precision"
    ),
    "offset_noise": To(
        "train.noise_offset", yes_is(0.1), off=(False,), note="a switch there, of strength 0.1"
    ),
    "checkpointing_steps": To("train.checkpointing_steps"),
    "checkpoints_total_limit": To("train.checkpoints_total_limit"),
    "input_perturbation": To("train.ip_noise_gamma", off=(0, 0.0)),
    **joined(
        "AdamW unless use_8bit_adam or optimizer is given", "optimizer.name", "optimizer", "use_8bit_adam"
    ),
    **to("optimizer", "learning_rate", "text_encoder_lr", "lr_scheduler", "lr_num_cycles", "lr_power"),
    "scale_lr": To("optimizer.scale_lr", off=(False,)),
    "lr_warmup_steps": To("optimizer.lr_warmup_steps", note="optimizer steps, for any number of workers"),
    **to("optimizer", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm"),
    **changes(
        "both parts have one weight decay: optimizer.adam_weight_decay", "adam_weight_decay_text_encoder"
    ),
    "use_ema": To("engine.use_ema"),
    "allow_tf32": To("engine.allow_tf32"),
    "validation_prompt": To("validation.prompts"),
    "validation_prompts": To(
        "validation.prompts", lambda value: value if isinstance(value, list) else [value]
    ),
    "num_validation_images": To("validation.num_images"),
    "validation_steps": To("validation.steps"),
    **ignored("previews are counted in steps: validation.steps", "validation_epochs"),
    "output_dir": To("output_dir"),
    "report_to": To("report_to", trackers),
    "tracker_project_name": To("tracking.project"),
    "launcher.num_processes": To("scaling.num_workers"),
    "save_steps": To("train.checkpointing_steps", note="the embedding is saved with each checkpoint"),
    **changes(_HUB_DATA, "dataset_name", "dataset_config_name"),
    **changes("all images of the folder are used", "max_train_samples"),
    **changes(
        "the first of text, caption and prompt, or data.caption_column", "image_column", off=("image",)
    ),
    **changes(
        "there is no such loss", "dream_training", "do_edm_style_training", "class_labels_conditioning"
    ),
    **ignored("an option of dream_training", "dream_detail_preservation"),
    **changes("images are resized with one filter", "image_interpolation_mode", off=("lanczos",)),
    **changes(
        "prompts have 75, 150 or 225 tokens: model.max_token_length", "tokenizer_max_length", off=(77,)
    ),
    "timestep_bias_strategy": To("train.timestep_sampling", off=("none",)),
    "timestep_bias_multiplier": To("train.timestep_bias_multiplier"),
    "timestep_bias_begin": To("train.timestep_bias_begin"),
    "timestep_bias_end": To("train.timestep_bias_end"),
    "timestep_bias_portion": To("train.timestep_bias_portion"),
    **changes("the optimizer has no such option here", "prodigy_beta3"),
    **ignored(
        "is on here as well", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup"
    ),
    **changes(
        "words and weights are trained by methods of their own", "train_text_encoder_ti", "token_abstraction"
    ),
    **changes("words and weights are trained by methods of their own", "num_new_tokens_per_abstraction"),
    **changes("words and weights are trained by methods of their own", "train_text_encoder_frac"),
    **changes("words and weights are trained by methods of their own", "train_text_encoder_ti_frac"),
    **ignored(ATTENTION, "enable_xformers_memory_efficient_attention", "enable_npu_flash_attention"),
    **ignored("gradients are always freed after each step", "set_grads_to_none"),
    **ignored(
        SPEED,
        "dataloader_num_workers",
        "local_rank",
        "pre_compute_text_embeddings",
        "cache_dir",
        "offload_ema",
    ),
    **ignored(SPEED, "foreach_ema", "cache_latents", "debug_loss", "prior_generation_precision"),
    **ignored("tokenizers are part of the model", "tokenizer_name", "text_encoder_use_attention_mask"),
    **ignored("continue a run with --resume", "resume_from_checkpoint", "non_ema_revision"),
    **ignored(WEB, "push_to_hub", "hub_model_id", "hub_token", "logging_dir", "skip_save_text_encoder"),
    **ignored(WEB, "output_kohya_format", "save_as_full_pipeline", "no_safe_serialization"),
    **ignored("previews have a sampler of their own: validation.scheduler", "validation_scheduler"),
    **ignored("previews are drawn from prompts alone", "validation_images"),
}
_DEFAULTS: Mapping[str, object] = {
    "train_batch_size": 4,
    "learning_rate": 5e-6,
    "center_crop": False,
    "lr_warmup_steps": 500,
}
_SCRIPT_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "train_dreambooth": {},
    "train_dreambooth_lora": {"learning_rate": 5e-4},
    "train_dreambooth_lora_sdxl": {"learning_rate": 1e-4, "resolution": 1024, "adam_weight_decay": 1e-4},
    "train_dreambooth_lora_sd15_advanced": {"learning_rate": 1e-4, "adam_weight_decay": 1e-4},
    "train_dreambooth_lora_sdxl_advanced": {
        "learning_rate": 1e-4,
        "resolution": 1024,
        "adam_weight_decay": 1e-4,
    },
    "train_text_to_image": {"train_batch_size": 16, "learning_rate": 1e-4},
    "train_text_to_image_lora": {"train_batch_size": 16, "learning_rate": 1e-4},
    "train_text_to_image_sdxl": {"train_batch_size": 16, "learning_rate": 1e-4, "resolution": 1024},
    "train_text_to_image_lora_sdxl": {"train_batch_size": 16, "learning_rate": 1e-4, "resolution": 1024},
    "textual_inversion": {"train_batch_size": 16, "learning_rate": 1e-4, "repeats": 100},
    "textual_inversion_sdxl": {"train_batch_size": 16, "learning_rate": 1e-4, "repeats": 100},
}
_EPOCHS = {"train_text_to_image": 100, "textual_inversion": 100}  # others: 1


class DiffusersScripts(Importer):
    """Translates the options of diffusers' DreamBooth, text-to-image and Textual Inversion scripts."""

    name: ClassVar[str] = "diffusers"
    title: ClassVar[str] = "diffusers' scripts"
    version: ClassVar[str] = "August 2026"
    kinds: ClassVar[tuple[str, ...]] = ("command",)
    rules: ClassVar[Table] = RULES
    patterns: ClassVar[Table] = {
        "launcher.*": Gone(Effect.IGNORED, "Ray starts the workers: scaling", (True,)),
        "environment.*": Gone(Effect.IGNORED, "a variable of the shell, already filled in"),
    }
    scripts: ClassVar[Mapping[str, str]] = SCRIPTS
    defaults: ClassVar[Mapping[str, object]] = _DEFAULTS
    markers: ClassVar[frozenset[str]] = frozenset(
        {"validation_epochs", "with_prior_preservation", "offset_noise"}
    )

    script = ""

    def detect(self, document: Document) -> float:
        is_example = document.script.startswith("train_") and document.script not in SCRIPTS
        return super().detect(document) or (0.6 if is_example else 0.0)

    def method(self, settings: Settings, documents: Sequence[Document]) -> str:
        self.script = next((each.script for each in documents if each.script), "train_dreambooth")
        if self.script not in SCRIPTS:
            refuse_family(self.title, "the script", f"{self.script}.py")
        return SCRIPTS[self.script]

    def defaults_for(self, settings: Settings) -> Mapping[str, object]:
        own = dict(_DEFAULTS) | dict(_SCRIPT_DEFAULTS.get(self.script, {}))
        return own

    def finish(self, settings: Settings, draft: Draft) -> None:
        self._finish_images(settings, draft)
        steps = settings.get("max_train_steps")
        if self.script.startswith("textual_inversion") and not steps:
            steps = 5000
        default = next((count for name, count in _EPOCHS.items() if self.script.startswith(name)), 1)
        put_length(
            draft,
            steps=steps,
            epochs=settings.get("num_train_epochs", default),
            source="max_train_steps" if steps else "num_train_epochs",
            note=""
            if settings.has("max_train_steps") or settings.has("num_train_epochs")
            else "their default",
        )
        eight_bit = plain(settings.get("use_8bit_adam")) is True
        name = optimizer_name(settings.get("optimizer", "AdamW"))
        draft.put(
            "optimizer.name", "adamw8bit" if eight_bit and name == "adamw" else name, source="optimizer"
        )
        precision = settings.get("mixed_precision", settings.get("launcher.mixed_precision"))
        if precision:
            source = (
                "mixed_precision" if settings.has("mixed_precision") else "the launcher's mixed_precision"
            )
            draft.put("train.mixed_precision", precision, source=source)
        if "_lora" in self.script:
            rank = settings.get("rank", 4)
            draft.put(
                "method.lora_rank", int(number(rank)), source="rank", is_default=not settings.has("rank")
            )
        self._finish_warmup(settings, draft)

    def _finish_images(self, settings: Settings, draft: Draft) -> None:
        prompt: Any = settings.get("instance_prompt")
        if prompt is not None:
            draft.put("data.instance_prompt", prompt, source="instance_prompt")
            draft.put(
                "data.use_captions",
                False,
                source="instance_prompt",
                note="the script gives every image this prompt and reads no caption files",
            )
        if draft.method == "textual_inversion" and settings.has("train_data_dir"):
            draft.drop("data.train_data_dir")
            draft.put("data.instance_data_dir", settings.get("train_data_dir"), source="train_data_dir")
            draft.put(
                "data.use_captions",
                False,
                source="train_data_dir",
                note="the script uses templates, not captions",
            )

    def _finish_warmup(self, settings: Settings, draft: Draft) -> None:
        """Write no warmup for a constant schedule, which has none there."""
        schedule = str(settings.get("lr_scheduler", "constant"))
        if schedule == "constant" and draft.get("optimizer.lr_warmup_steps"):
            line = draft.lines["optimizer.lr_warmup_steps"]
            draft.drop("optimizer.lr_warmup_steps")
            if not line.is_default:
                reason = "the schedule constant has no warmup there; constant_with_warmup has"
                draft.leave("lr_warmup_steps", line.value, Effect.IGNORED, reason)
