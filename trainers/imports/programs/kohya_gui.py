"""Imports the JSON configs of bmaltais/kohya_ss, the GUI of kohya's scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dreamfleet.trainers.imports.command_line import parse_command
from dreamfleet.trainers.imports.draft import Draft
from dreamfleet.trainers.imports.image_sets import with_metadata
from dreamfleet.trainers.imports.programs.common import (
    SPEED,
    WEB,
    optimizer_name,
    put_length,
    put_resolution,
    put_warmup,
    refuse_family,
)
from dreamfleet.trainers.imports.programs.kohya import Kohya
from dreamfleet.trainers.imports.rules import (
    Effect,
    Table,
    To,
    blocks,
    changes,
    choice,
    ignored,
    is_off,
    joined,
    number,
    plain,
    to,
)
from dreamfleet.trainers.imports.settings import Document, Settings

_OTHER = "is of models that are not trained here (SD 3, Flux)"
_LYCORIS = "is an option of LyCORIS"
_ADVICE = "a field of the GUI alone"
_LORAS = {
    "standard": "",
    "kohya locon": "locon",
    "lycoris/locon": "locon",
    "lycoris/lokr": "lokr",
    "lycoris/loha": "loha",
    "lycoris/ia3": "ia3",
    "lycoris/dylora": "dylora",
    "lycoris/glora": "glora",
    "lycoris/diag-oft": "diag-oft",
    "lycoris/native fine-tuning": "full",
    "lora-fa": "",
}

GUI_RULES: Table = {
    "optimizer": To("optimizer.name", optimizer_name),
    **joined("a percentage of all steps", "optimizer.lr_warmup_steps", "lr_warmup"),
    **joined("passes over the images, used without max_train_steps", "train.num_train_epochs", "epoch"),
    **joined("w,h there, the side of a square here", "data.resolution", "max_resolution"),
    **joined("the kind of LoRA", "method.lora_type", "LoRA_type"),
    **joined("layers of the LoRA: locon", "method.lora_target_modules", "conv_dim"),
    **joined("as network_alpha, for convolutions", "method.lora_alpha", "conv_alpha"),
    "rank_dropout": To("method.rank_dropout", off=(0, 0.0)),
    "module_dropout": To("method.module_dropout", off=(0, 0.0)),
    "loraplus_lr_ratio": To("method.loraplus_lr_ratio", off=(0, 0.0)),
    "loraplus_unet_lr_ratio": To("method.loraplus_unet_lr_ratio", off=(0, 0.0)),
    "loraplus_text_encoder_lr_ratio": To("method.loraplus_text_encoder_lr_ratio", off=(0, 0.0)),
    "dora_wd": To("method.use_dora", off=(False,)),
    **joined("SDXL", "model.pretrained_model_name_or_path", "sdxl", "sdxl_checkbox"),
    **changes("blocks of the LoRA have one rank", "block_dims", "block_alphas", "conv_block_dims"),
    **changes("blocks of the LoRA have one rank", "conv_block_alphas", "conv_dims", "conv_alphas"),
    **{name: To(f"method.{name}", off=("",)) for name in ("down_lr_weight", "mid_lr_weight", "up_lr_weight")},
    **changes("write 0 for the weights below it", "block_lr_zero_threshold"),
    "factor": To("method.lokr_factor", off=(-1,)),
    "decompose_both": To("method.lokr_decompose_both", off=(False,)),
    **ignored(_LYCORIS, "LyCORIS_preset", "unit", "constrain", "rescaled", "train_on_input", "use_cp"),
    **ignored(
        _LYCORIS,
        "use_tucker",
        "use_scalar",
        "train_norm",
        "bypass_mode",
        "rank_dropout_scale",
    ),
    **changes("training starts from the base model", "lora_network_weights"),
    **joined("one of two forms of noise", "train.noise_offset", "noise_offset_type"),
    "template": To(
        "method.template_file",
        choice({"caption": "filewords", "object template": "object", "style template": "style"}),
    ),
    **joined("options as text", "train", "additional_parameters"),
    **ignored(SPEED, "sdxl_no_half_vae"),
    **ignored(
        SPEED, "sdxl_cache_text_encoder_outputs", "num_cpu_threads_per_process", "gpu_ids", "multi_gpu"
    ),
    **ignored(
        "Ray starts the workers: scaling", "num_machines", "main_process_port", "extra_accelerate_launch_args"
    ),
    **ignored(SPEED, "dynamo_mode", "dynamo_use_dynamic", "dynamo_use_fullgraph"),
    "num_processes": To("scaling.num_workers"),
    **ignored(_ADVICE, "model_list", "save_as_bool", "training_comment", "full_path", "create_caption"),
    **ignored(
        _ADVICE, "create_buckets", "generate_caption_database", "generate_image_buckets", "use_latent_files"
    ),
    **ignored(WEB, "use_wandb"),
    **joined("the folder of captioned images", "data.train_data_dir", "image_folder"),
    **ignored(_ADVICE, "latent_metadata_filename"),
    **joined(
        "in train_dir: captions and tags", "data.instance_data_dir", "caption_metadata_filename", "train_dir"
    ),
    **joined("a percentage of all steps", "method.train_text_encoder", "stop_text_encoder_training_pct"),
    **joined("used if the config has it as batch size", "train.train_batch_size", "batch_size"),
    **blocks(_OTHER, "flux1_checkbox", "sd3_checkbox"),
    **ignored(
        _OTHER, "split_mode", "train_blocks", "model_prediction_type", "timestep_sampling", "save_clip"
    ),
    **ignored(
        _OTHER, "save_t5xxl", "sd3_cache_text_encoder_outputs", "sd3_cache_text_encoder_outputs_to_disk"
    ),
    **ignored(_OTHER, "sd3_text_encoder_batch_size", "sd3_fused_backward_pass", "flux_fused_backward_pass"),
    **ignored(_OTHER, "double_blocks_to_swap", "single_blocks_to_swap", "blockwise_fused_optimizers"),
    **ignored(_OTHER, "flux1_cache_text_encoder_outputs", "flux1_cache_text_encoder_outputs_to_disk"),
    **ignored(_OTHER, "flux1_clip_l", "flux1_t5xxl"),
    **to("train", "mixed_precision"),
}


class KohyaGui(Kohya):
    """Translates the settings of bmaltais/kohya_ss, which are kohya's options and those of the GUI."""

    name: ClassVar[str] = "kohya-gui"
    title: ClassVar[str] = "the kohya_ss GUI"
    version: ClassVar[str] = "July 2026"
    kinds: ClassVar[tuple[str, ...]] = ("json",)
    rules: ClassVar[Table] = {**Kohya.rules, **GUI_RULES}
    scripts: ClassVar[Mapping[str, str]] = {}
    markers: ClassVar[frozenset[str]] = frozenset(
        {
            "LoRA_type",
            "max_resolution",
            "lr_warmup",
            "sample_sampler",
            "additional_parameters",
            "stop_text_encoder_training",
        }
    )
    contradictions: ClassVar[Sequence[tuple[str, str, str]]] = tuple(
        pair for pair in Kohya.contradictions if pair[0] != "dataset_config"
    )

    def flat(self, document: Document) -> object:
        """Return the fields, with the options that were given as text."""
        content = document.content
        if not isinstance(content, dict):
            return super().flat(document)
        content = {key: value for key, value in content.items() if value not in ("", None)}
        extra = content.pop("additional_parameters", "")
        if str(extra).strip():
            content |= parse_command("-- " + str(extra)).options
        if str(content.get("noise_offset_type", "")).lower() == "multires":
            content.pop("noise_offset", None)
        elif content.get("noise_offset_type"):
            content.pop("multires_noise_iterations", None)
        if content.get("dataset_config"):
            for key in ("train_data_dir", "reg_data_dir"):
                content.pop(key, None)
        if content.get("min_timestep") is False:
            content.pop("min_timestep")
        return super().flat(Document(document.path, "json", content))

    def method(self, settings: Settings, documents: Sequence[Document]) -> str:
        for key in ("flux1_checkbox", "sd3_checkbox"):
            if plain(settings.get(key)) is True:
                refuse_family(self.title, key, "true")
        kind = str(settings.get("LoRA_type", "")).lower()
        if "flux" in kind or "sd3" in kind:
            refuse_family(self.title, "LoRA_type", settings.get("LoRA_type"))
        if settings.has("LoRA_type"):
            return "dreambooth" if settings.has("reg_data_dir") else "native"
        if settings.has("image_folder") or settings.has("caption_metadata_filename"):
            return "native"
        return super().method(settings, documents)

    def _finish_images(self, settings: Settings, draft: Draft) -> None:
        if settings.has("max_resolution"):
            put_resolution(draft, "max_resolution", settings.get("max_resolution"))
        name = settings.get("caption_metadata_filename")
        if name and settings.has("image_folder") and not settings.has("dataset_config"):
            beside = settings.get("train_dir")
            file = f"{beside}/{name}" if beside else str(name)
            place = with_metadata(draft, "caption_metadata_filename", file, settings.get("image_folder"))
            draft.put("data.instance_data_dir", place, source="caption_metadata_filename")
        elif settings.has("image_folder") and not settings.has("dataset_config"):
            draft.put("data.train_data_dir", settings.get("image_folder"), source="image_folder")
        super()._finish_images(settings, draft)

    def _finish_length(self, settings: Settings, draft: Draft) -> None:
        """Write the length: the GUI computes the steps from ``epoch`` unless max_train_steps is given."""
        steps, epochs = settings.get("max_train_steps"), settings.get("epoch")
        from_epoch = is_off(steps, (0,)) and is_off(settings.get("max_train_epochs"), (0,)) and epochs
        if is_off(steps, (0,)):
            settings = _without(settings, "max_train_steps")
        super()._finish_length(settings, draft)
        if from_epoch:
            draft.drop("train.max_train_steps")
            note = "the GUI computes the steps from it, twice as many with class images"
            put_length(draft, epochs=epochs, source="epoch", note=note)
        warmup = settings.get("lr_warmup")
        if not is_off(warmup, (0,)) and is_off(settings.get("lr_warmup_steps"), (0,)):
            put_warmup(draft, "lr_warmup", number(warmup) / 100)

    def _finish_rest(self, settings: Settings, draft: Draft) -> None:
        kind = _LORAS.get(str(settings.get("LoRA_type", "")).strip().lower())
        if kind and kind != "locon":
            draft.put("method.lora_type", kind, source="LoRA_type", shown=settings.get("LoRA_type"))
        conv = settings.get("conv_dim")
        if kind in ("lokr", "loha"):
            note = "LyCORIS adapts convolutions too"
            draft.replace("method.lora_target_modules", "locon", source="LoRA_type", note=note)
        if kind in ("locon", "lokr", "loha") and not is_off(conv, (0,)):
            draft.replace("method.lora_target_modules", "locon", source="LoRA_type")
            rank, alpha = draft.get("method.lora_rank"), draft.get("method.lora_alpha")
            for key, ours in (("conv_dim", rank), ("conv_alpha", alpha)):
                given: Any = settings.get(key)
                if given is not None and number(given) != number(ours):
                    draft.leave(key, given, Effect.CHANGES, f"all layers have the same: {ours} is used")
        super()._finish_rest(settings, draft)


def _without(settings: Settings, *keys: str) -> Settings:
    return Settings({key: list(items) for key, items in settings.found.items() if key not in keys})
