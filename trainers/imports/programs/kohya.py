"""Imports the training and dataset configs (TOML) and the command lines of kohya-ss/sd-scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dreamfleet.trainers.imports.draft import Draft
from dreamfleet.trainers.imports.image_sets import use_class_images, with_metadata, write_sets
from dreamfleet.trainers.imports.importer import Importer
from dreamfleet.trainers.imports.programs import kohya_keys
from dreamfleet.trainers.imports.programs.common import (
    key_values,
    options_of,
    put_length,
    put_options,
    put_output,
    put_resolution,
    put_warmup,
    refuse_family,
)
from dreamfleet.trainers.imports.programs.kohya_lora import write_lora
from dreamfleet.trainers.imports.programs.kohya_sets import read_subsets, with_inherited
from dreamfleet.trainers.imports.rules import Effect, Table, is_off, number, plain
from dreamfleet.trainers.imports.settings import Document, Settings

SCRIPTS: Mapping[str, str] = {
    "train_network": "native",
    "sdxl_train_network": "native",
    "train_db": "dreambooth",
    "fine_tune": "native",
    "sdxl_train": "native",
    "train_textual_inversion": "textual_inversion",
    "sdxl_train_textual_inversion": "textual_inversion",
    **dict.fromkeys(
        (
            *(
                "train_controlnet",
                "train_control_net",
                "sdxl_train_control_net",
                "sdxl_train_control_net_lllite",
            ),
            *("flux_train", "flux_train_network", "flux_train_control_net", "sd3_train", "sd3_train_network"),
            *("lumina_train", "lumina_train_network", "hunyuan_image_train_network", "anima_train"),
            *("anima_train_network", "train_leco", "train_textual_inversion_XTI"),
        ),
        "",
    ),
}
_ON = (False, 0)


class Kohya(Importer):
    """Translates the options of kohya-ss/sd-scripts."""

    name: ClassVar[str] = "kohya"
    title: ClassVar[str] = "kohya's sd-scripts"
    version: ClassVar[str] = "February 2026"
    kinds: ClassVar[tuple[str, ...]] = ("toml", "yaml", "command")
    rules: ClassVar[Table] = kohya_keys.RULES
    patterns: ClassVar[Table] = kohya_keys.PATTERNS
    scripts: ClassVar[Mapping[str, str]] = SCRIPTS
    named_files: ClassVar[tuple[str, ...]] = ("config_file", "dataset_config")
    defaults: ClassVar[Mapping[str, object]] = {"caption_extension": ".caption"}
    markers: ClassVar[frozenset[str]] = frozenset(
        {
            *(
                "network_module",
                "network_dim",
                "min_bucket_reso",
                "caption_extension",
                "save_model_as",
                "token_string",
            ),
            *(
                "max_data_loader_n_workers",
                "save_every_n_epochs",
                "datasets.*.subsets.*.image_dir",
                "optimizer_type",
            ),
        }
    )
    contradictions: ClassVar[Sequence[tuple[str, str, str]]] = (
        ("full_fp16", "full_bf16", "weights are kept in one precision"),
        ("cache_latents", "random_crop", "an image that is cropped at random has no latents to cache"),
        ("cache_latents", "color_aug", "an image whose colours change has no latents to cache"),
        ("network_train_unet_only", "network_train_text_encoder_only", "one excludes the other"),
        ("use_8bit_adam", "use_lion_optimizer", "there is one optimizer"),
        ("dataset_config", "train_data_dir", "the images are named twice"),
        ("use_object_template", "use_style_template", "there is one set of templates"),
    )

    def flat(self, document: Document) -> object:
        """Return the options; the program ignores the names of sections in its training config."""
        content = document.content
        if not isinstance(content, dict):
            return content
        flat: dict[str, Any] = {}
        for key, value in content.items():
            flat |= value if isinstance(value, dict) and key != "general" else {key: value}
        for name in ("optimizer_args", "network_args"):
            if flat.get(name):
                flat |= {f"{name}.{key}": each for key, each in key_values(flat.pop(name)).items()}
        return {key: value for key, value in flat.items() if key not in ("optimizer_args", "network_args")}

    def read(self, documents: Sequence[Document]) -> Settings:
        """Return the options, those of image folders once for all folders, inherited as the program does."""
        return with_inherited(super().read(documents))

    def method(self, settings: Settings, documents: Sequence[Document]) -> str:
        script = next((each.script for each in documents if each.script), "")
        if script in self.scripts and not self.scripts[script]:
            refuse_family(self.title, "the script", f"{script}.py")
        if self.scripts.get(script) == "textual_inversion" or settings.has("token_string"):
            return "textual_inversion"
        subsets = settings.found.get("datasets.*.subsets.*.is_reg", [])
        has_class = settings.has("reg_data_dir") or any(plain(item.value) is True for item in subsets)
        return "dreambooth" if has_class else self.scripts.get(script) or self._likely_method(settings)

    def _likely_method(self, settings: Settings) -> str:
        """Return the method of a config without a script: LoRA and fine-tuning are native, the rest DreamBooth."""
        keys = (
            "network_module",
            "network_dim",
            "in_json",
            "train_text_encoder",
            "learning_rate_te1",
            "block_lr",
        )
        return "native" if any(settings.has(key) for key in keys) else "dreambooth"

    def defaults_for(self, settings: Settings) -> Mapping[str, object]:
        has_own = any(key.endswith(".caption_extension") for key in settings.found)
        return {} if has_own else self.defaults

    def finish(self, settings: Settings, draft: Draft) -> None:
        self._finish_images(settings, draft)
        self._finish_length(settings, draft)
        self._finish_rates(settings, draft)
        put_options(draft, options_of(settings, "optimizer_args."))
        if draft.get("optimizer.name") == "adafactor" and not settings.has("optimizer_args.relative_step"):
            reason = "there Adafactor chooses its rate itself by default; here learning_rate is used"
            draft.leave("optimizer_args.relative_step", True, Effect.CHANGES, reason)
        self._finish_method(settings, draft)
        self._finish_rest(settings, draft)

    def _finish_images(self, settings: Settings, draft: Draft) -> None:
        if settings.has("resolution"):
            put_resolution(draft, "resolution", settings.get("resolution"))
        if cached := [
            key for key in ("cache_latents", "cache_latents_to_disk") if plain(settings.get(key)) is True
        ]:
            note = "latents that are cached there are sampled once"
            draft.put("data.latent_sampling", "once", source=cached[0], note=note)
        sets = read_subsets(settings, draft)
        write_sets(draft, sets)
        folder = settings.get("train_data_dir")
        if settings.has("in_json") and not sets:
            place = with_metadata(draft, "in_json", settings.get("in_json"), folder)
            draft.put("data.instance_data_dir", place, source="in_json")
        elif folder and not sets:
            draft.put("data.train_data_dir", folder, source="train_data_dir")
            if settings.has("reg_data_dir"):
                note = "its folders are named 1_cat: the prompt is in the name"
                folder = settings.get("reg_data_dir")
                draft.put("data.class_data_dir", folder, source="reg_data_dir", note=note)
                use_class_images(draft, "reg_data_dir")

    def _finish_length(self, settings: Settings, draft: Draft) -> None:
        epochs = settings.get("max_train_epochs")
        if epochs and not is_off(epochs, _ON):
            note = "steps of an epoch are rounded up for each bucket"
            put_length(draft, epochs=epochs, source="max_train_epochs", note=note)
            if settings.has("max_train_steps"):
                reason = "max_train_epochs takes precedence, as there"
                draft.leave("max_train_steps", settings.get("max_train_steps"), Effect.IGNORED, reason)
        else:
            steps = settings.get("max_train_steps")
            put_length(draft, steps=steps or 1600, source="max_train_steps", is_default=not steps)
        by_steps, by_epochs = settings.get("save_every_n_steps"), settings.get("save_every_n_epochs")
        if by_steps and not is_off(by_steps, _ON):
            draft.put("train.checkpointing_steps", by_steps, source="save_every_n_steps")
        elif by_epochs and not is_off(by_epochs, _ON):
            draft.put("train.save_every_n_epochs", by_epochs, source="save_every_n_epochs")
        warmup = settings.get("lr_warmup_steps")
        if warmup and isinstance(plain(warmup), float) and plain(warmup) < 1:
            put_warmup(draft, "lr_warmup_steps", number(warmup))
        elif warmup:
            draft.put("optimizer.lr_warmup_steps", int(number(warmup)), source="lr_warmup_steps")
        note = "of the launcher"
        if settings.has("launcher.mixed_precision") and "train.mixed_precision" not in draft.lines:
            draft.put("train.mixed_precision", settings.get("launcher.mixed_precision"), source="", note=note)

    def _finish_rates(self, settings: Settings, draft: Draft) -> None:
        base, unet = settings.get("learning_rate"), settings.get("unet_lr")
        source = "unet_lr" if unet else "learning_rate"
        draft.put(
            "optimizer.learning_rate",
            unet or base or 2e-6,
            source=source,
            note="takes precedence over learning_rate" if unet and base else "",
            is_default=not (unet or base),
        )
        texts = ("text_encoder_lr", "learning_rate_te", "learning_rate_te1")
        given = next((key for key in texts if settings.has(key)), None)
        text = settings.get(given) if given else base
        if isinstance(text, list):
            if len(text) > 1:
                draft.put("optimizer.text_encoder_2_lr", text[1], source=given or "")
            text = text[0]
        if text and (given or unet) and draft.method != "textual_inversion":
            note = "" if given else "the text encoder's is learning_rate"
            draft.put("optimizer.text_encoder_lr", text, source=given or "learning_rate", note=note)
        if settings.has("learning_rate_te2"):
            draft.put(
                "optimizer.text_encoder_2_lr", settings.get("learning_rate_te2"), source="learning_rate_te2"
            )
        if plain(settings.get("fused_backward_pass")) is True:
            draft.put("optimizer.fused_backward", True, source="fused_backward_pass")
            note = "there each parameter is clipped alone; with fused_backward nothing is clipped here"
            draft.replace("optimizer.max_grad_norm", 0, source="fused_backward_pass", note=note)

    def _finish_method(self, settings: Settings, draft: Draft) -> None:
        if draft.method == "textual_inversion":
            draft.put(
                "method.placeholder_token",
                settings.get("token_string", "SET-THE-WORD"),
                source="token_string",
            )
            if settings.has("init_word"):
                draft.put("method.initializer_token", settings.get("init_word"), source="init_word")
            return
        trains_text = plain(settings.get("stop_text_encoder_training")) != -1
        switches = ("network_train_unet_only", "cache_text_encoder_outputs")
        off = next((key for key in switches if plain(settings.get(key)) is True), None)
        if self._has_flag_for_text(settings):
            trains_text, off = plain(settings.get("train_text_encoder")) is True, "train_text_encoder"
        if trains_text and off != "train_text_encoder" and off is None:
            draft.put("method.train_text_encoder", True, source="network_train_unet_only", is_default=True)
        elif trains_text and off == "train_text_encoder":
            draft.put("method.train_text_encoder", True, source=off)
        rank = settings.get("network_dim")
        if rank or settings.has("network_module") or settings.has("network_alpha"):
            write_lora(settings, draft, rank)
        stop = settings.get("stop_text_encoder_training")
        if stop and plain(stop) not in (0, -1):
            reason = "the text encoder is trained until the end, or not at all"
            draft.leave("stop_text_encoder_training", stop, Effect.CHANGES, reason)
        weight = settings.get("prior_loss_weight", settings.get("datasets.*.prior_loss_weight"))
        if weight is not None and "method.with_prior_preservation" in draft.lines:
            draft.put("method.prior_loss_weight", weight, source="prior_loss_weight")

    def _has_flag_for_text(self, settings: Settings) -> bool:
        """Return whether the text encoder is trained only if train_text_encoder is set, as in fine_tune.py."""
        lora = settings.has("network_dim") or settings.has("network_module")
        keys = ("in_json", "train_text_encoder", "learning_rate_te1", "block_lr")
        return not lora and any(settings.has(key) for key in keys)

    def _finish_rest(self, settings: Settings, draft: Draft) -> None:
        folder, name = settings.get("output_dir"), settings.get("output_name")
        if folder or name:
            put_output(draft, folder or "runs", name, source="output_dir, output_name")
        if plain(settings.get("deepspeed")) is True:
            draft.put("engine.zero_stage", plain(settings.get("zero_stage", 2)), source="zero_stage")
        if draft.lines.get("train.multires_noise_iterations"):
            discount = settings.get("multires_noise_discount", 0.3)
            draft.put("train.multires_noise_discount", discount, source="multires_noise_discount")
        if draft.get("train.loss_type") in ("huber", "smooth_l1"):
            for key, default in (("huber_schedule", "snr"), ("huber_c", 0.1)):
                draft.put(
                    f"train.{key}", settings.get(key, default), source=key, is_default=not settings.has(key)
                )
        skip = settings.get("clip_skip")
        if skip and self._is_sdxl(settings):
            draft.leave("clip_skip", skip, Effect.IGNORED, "the SDXL scripts do not use it")
        elif skip:
            draft.put("model.clip_skip", skip, source="clip_skip")

    def _is_sdxl(self, settings: Settings) -> bool:
        model = str(settings.get("pretrained_model_name_or_path", "")).lower()
        return plain(settings.get("sdxl")) is True or "xl" in re.split(
            r"[^a-z]+", model.replace("sdxl", "xl")
        )
