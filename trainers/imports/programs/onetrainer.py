"""Imports the JSON configs and presets of Nerogar/OneTrainer, with its files of concepts and samples."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dreamfleet.trainers.imports.draft import Draft
from dreamfleet.trainers.imports.importer import Importer
from dreamfleet.trainers.imports.programs import onetrainer_keys
from dreamfleet.trainers.imports.programs.common import (
    ATTENTION_LAYERS,
    BLOCK_LAYERS,
    options_of,
    put_layers,
    put_options,
    put_output,
    put_resolution,
    put_warmup,
    refuse_family,
)
from dreamfleet.trainers.imports.programs.onetrainer_concepts import write_concepts, write_previews
from dreamfleet.trainers.imports.rules import Effect, Table, is_off, number, plain
from dreamfleet.trainers.imports.settings import Document, Settings

_NEWEST = 11  # of the config format that the tables describe
_METHODS = {"FINE_TUNE": "native", "LORA": "native", "EMBEDDING": "textual_inversion"}
_FAMILIES = ("STABLE_DIFFUSION_15", "STABLE_DIFFUSION_20", "STABLE_DIFFUSION_20_BASE", "STABLE_DIFFUSION_21")
_TRAINED = (*_FAMILIES, "STABLE_DIFFUSION_21_BASE", "STABLE_DIFFUSION_XL_10_BASE")
_SCHEDULES = {
    "LINEAR": "linear",
    "COSINE": "cosine",
    "COSINE_WITH_RESTARTS": "cosine_with_restarts",
    "COSINE_WITH_HARD_RESTARTS": "cosine_with_restarts",
}
_LAYERS: Mapping[str, Any] = {"attn-mlp": BLOCK_LAYERS, "attn-only": ATTENTION_LAYERS, "full": "locon"}
# Names of formats 0 and 1 -> today's
_OLD_NAMES = {
    **{f"train_{part}": f"{part}.train" for part in ("unet", "text_encoder", "text_encoder_2")},
    **{
        f"{part}_{name}": f"{part}.{name}"
        for part in ("unet", "text_encoder", "text_encoder_2", "vae")
        for name in ("learning_rate", "weight_dtype", "model_name")
    },
    **{f"train_{part}_epochs": f"{part}.stop_training_after" for part in ("unet", "text_encoder")},
    "token_count": "embedding.token_count",
    "initial_embedding_text": "embedding.initial_embedding_text",
}


class OneTrainer(Importer):
    """Translates the settings of OneTrainer."""

    name: ClassVar[str] = "onetrainer"
    title: ClassVar[str] = "OneTrainer"
    version: ClassVar[str] = "August 2026"
    kinds: ClassVar[tuple[str, ...]] = ("json",)
    rules: ClassVar[Table] = onetrainer_keys.RULES
    patterns: ClassVar[Table] = onetrainer_keys.PATTERNS
    named_files: ClassVar[tuple[str, ...]] = ("concept_file_name", "sample_definition_file_name")
    markers: ClassVar[frozenset[str]] = frozenset(
        {
            "training_method",
            "base_model_name",
            "output_model_destination",
            "concept_file_name",
            "concepts.*.text.prompt_source",
        }
    )
    defaults: ClassVar[Mapping[str, object]] = {
        "base_model_name": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "epochs": 100,
        "train_dtype": "FLOAT_16",
        "aspect_ratio_bucketing": True,
        "rolling_backup_count": 3,
    }
    contradictions: ClassVar[Sequence[tuple[str, str, str]]] = (
        ("force_v_prediction", "force_epsilon_prediction", "the model predicts one of them"),
    )

    def flat(self, document: Document) -> object:
        """Return the settings; a file that is a list holds concepts (with paths) or samples (with prompts)."""
        content = document.content
        if isinstance(content, list):
            is_samples = all(isinstance(item, dict) and "prompt" in item for item in content)
            return {"samples" if is_samples else "concepts": content}
        content = {_OLD_NAMES.get(key, key): value for key, value in content.items()}
        if isinstance(content.get("optimizer"), str):  # format 0: optimizer_beta1 beside optimizer
            nested = {
                key.removeprefix("optimizer_"): content[key]
                for key in content
                if key.startswith("optimizer_")
            }
            rest = {key: value for key, value in content.items() if not key.startswith("optimizer")}
            return {**rest, "optimizer": {"optimizer": content["optimizer"], **nested}}
        return content

    def method(self, settings: Settings, documents: Sequence[Document]) -> str:
        kind = settings.get("model_type", "STABLE_DIFFUSION_15")
        if kind not in _TRAINED:
            refuse_family(self.title, "model_type", kind)
        method = settings.get("training_method", "FINE_TUNE")
        if method not in _METHODS:
            refuse_family(self.title, "training_method", method)
        return _METHODS[method]

    def defaults_for(self, settings: Settings) -> Mapping[str, object]:
        own: dict[str, object] = dict(self.defaults)
        if settings.get("training_method") == "LORA":
            own |= {"lora_rank": 16, "lora_alpha": 1.0}
        if settings.get("training_method") == "EMBEDDING":
            own |= {"embedding.token_count": 1, "embedding.initial_embedding_text": "*"}
        return own

    def finish(self, settings: Settings, draft: Draft) -> None:
        self._finish_version(settings, draft)
        write_concepts(settings, draft)
        put_resolution(
            draft, "resolution", settings.get("resolution", "512"), is_default=not settings.has("resolution")
        )
        self._finish_rates(settings, draft)
        put_options(draft, _own_options(settings))
        self._finish_loss(settings, draft)
        self._finish_method(settings, draft)
        write_previews(settings, draft)

    def _finish_version(self, settings: Settings, draft: Draft) -> None:
        version = settings.get("__version")
        if version is not None and number(version) > _NEWEST:
            reason = (
                f"a newer format than {_NEWEST}, of {self.version}: settings may have changed their meaning"
            )
            draft.leave("__version", version, Effect.CHANGES, reason)

    def _finish_rates(self, settings: Settings, draft: Draft) -> None:
        unet = settings.get("unet.learning_rate")
        rate = unet or settings.get("learning_rate")
        draft.put(
            "optimizer.learning_rate",
            rate or 3e-6,
            source="unet.learning_rate" if unet else "learning_rate",
            is_default=not rate,
        )
        schedule = str(settings.get("learning_rate_scheduler", "CONSTANT"))
        warmup = number(settings.get("learning_rate_warmup_steps", 200))
        if schedule == "CONSTANT":
            name = "constant_with_warmup" if warmup else "constant"
            note = "its constant schedule has a warmup" if warmup else ""
            draft.put("optimizer.lr_scheduler", name, source="learning_rate_scheduler", note=note)
        elif schedule in _SCHEDULES:
            draft.put("optimizer.lr_scheduler", _SCHEDULES[schedule], source="learning_rate_scheduler")
        else:
            draft.leave("learning_rate_scheduler", schedule, Effect.CHANGES, "there is no such schedule")
        if 0 < warmup <= 1:
            put_warmup(draft, "learning_rate_warmup_steps", warmup)
        elif warmup:
            steps = max(1, int(warmup // number(settings.get("gradient_accumulation_steps", 1))))
            given = settings.has("learning_rate_warmup_steps")
            note = "batches there, optimizer steps here" if steps != warmup else ""
            draft.put(
                "optimizer.lr_warmup_steps",
                steps,
                source="learning_rate_warmup_steps",
                note=note,
                is_default=not given,
            )
        scaler = settings.get("learning_rate_scaler", "NONE")
        if scaler != "NONE":
            reason = "there the rate grows with the root of the batch, or with a part of it: multiply learning_rate"
            if scaler in ("BOTH", "LINEAR_BOTH"):
                draft.put("optimizer.scale_lr", True, source="learning_rate_scaler")
            else:
                draft.leave("learning_rate_scaler", scaler, Effect.CHANGES, reason)

    def _finish_loss(self, settings: Settings, draft: Draft) -> None:
        old_gamma = settings.get("min_snr_gamma")
        if not is_off(old_gamma, (0,)):
            draft.put("train.snr_gamma", old_gamma, source="min_snr_gamma")
        weight = settings.get("loss_weight_fn", "CONSTANT")
        if weight == "MIN_SNR_GAMMA":
            gamma = settings.get("loss_weight_strength", 5.0)
            draft.put("train.snr_gamma", gamma, source="loss_weight_fn, loss_weight_strength")
        elif weight == "DEBIASED_ESTIMATION":
            draft.put("train.debiased_estimation_loss", True, source="loss_weight_fn", shown=weight)
        elif weight != "CONSTANT":
            draft.leave("loss_weight_fn", weight, Effect.CHANGES, "there is no such weight of the loss")
        if draft.get("train.timestep_sampling") == "logit_normal":
            draft.put("train.logit_mean", number(settings.get("noising_bias", 0)), source="noising_bias")
            width = number(settings.get("noising_weight", 0)) + 1
            draft.put("train.logit_std", width, source="noising_weight", note="1 is added there")
        strengths = {"mse": 1.0, "mae": 0.0, "huber": 0.0}
        given = {
            name: number(settings.get(f"{name}_strength", default)) for name, default in strengths.items()
        }
        used = [name for name, value in given.items() if value]
        if used == ["mae"]:
            draft.put("train.loss_type", "l1", source="mae_strength", shown=given["mae"])
        elif used == ["huber"]:
            note = "constant over the timesteps"
            draft.put("train.loss_type", "huber", source="huber_strength", note=note, shown=given["huber"])
            draft.put("train.huber_c", settings.get("huber_delta", 1.0), source="huber_delta")
            draft.put("train.huber_schedule", "constant", source="huber_strength")
        elif used != ["mse"]:
            draft.leave(
                "mse_strength", given, Effect.CHANGES, "losses are not mixed; the mean square error is used"
            )
        if "data.alpha_mask" in draft.lines and draft.get("data.alpha_mask"):
            for key, default in (("unmasked_probability", 0.1), ("unmasked_weight", 0.1)):
                reason = "pixels outside the mask have the weight of its grey value, at every use"
                draft.leave(key, settings.get(key, default), Effect.CHANGES, reason)
        if draft.get("engine.use_ema"):
            draft.put(
                "engine.ema_decay",
                settings.get("ema_decay", 0.999),
                source="ema_decay",
                is_default=not settings.has("ema_decay"),
            )
            interval = settings.get("ema_update_step_interval", 5)
            if not is_off(interval, (1,)):
                reason = "the average is updated at every step, so it forgets faster"
                draft.leave("ema_update_step_interval", interval, Effect.CHANGES, reason)

    def _finish_method(self, settings: Settings, draft: Draft) -> None:
        destination = os.path.splitext(str(settings.get("output_model_destination", "models/model")))[0]
        put_output(draft, destination, None, source="output_model_destination")
        if skip := int(number(settings.get("text_encoder_layer_skip", 0))):
            note = "layers that are skipped there; 1 is the family's own here"
            draft.put("model.clip_skip", skip + 1, source="text_encoder_layer_skip", note=note)
        if plain(settings.get("optimizer.fused_back_pass")) is True:
            draft.put("optimizer.fused_backward", True, source="optimizer.fused_back_pass")
            draft.replace(
                "optimizer.max_grad_norm", 0, source="optimizer.fused_back_pass", note="nothing is clipped"
            )
        checkpointing = plain(settings.get("unet.gradient_checkpointing", True)) is True
        draft.put(
            "train.gradient_checkpointing",
            checkpointing,
            source="unet.gradient_checkpointing",
            is_default=not settings.has("unet.gradient_checkpointing"),
        )
        if draft.method == "textual_inversion":
            word = settings.get("embedding.placeholder", "<embedding>")
            draft.put("method.placeholder_token", word, source="embedding.placeholder")
            return
        trains = [
            plain(settings.get(f"{part}.train", True)) is True for part in ("text_encoder", "text_encoder_2")
        ]
        has_two = settings.get("model_type") == "STABLE_DIFFUSION_XL_10_BASE"
        if trains[0] and (trains[1] or not has_two):
            given = settings.has("text_encoder.train")
            draft.put("method.train_text_encoder", True, source="text_encoder.train", is_default=not given)
        elif has_two and trains[0] != trains[1]:
            draft.leave(
                "text_encoder_2.train", trains[1], Effect.CHANGES, "both text encoders are trained, or none"
            )
        if settings.get("training_method") == "LORA":
            self._finish_layers(settings, draft)
            if draft.get("method.lora_type") == "lokr":
                rank, given = settings.get("lokr_dim", 16), settings.has("lokr_dim")
                draft.replace("method.lora_rank", int(number(rank)), source="lokr_dim", is_default=not given)

    def _finish_layers(self, settings: Settings, draft: Draft) -> None:
        preset, names = settings.get("layer_filter_preset", "full"), settings.get("layer_filter")
        layers = _LAYERS.get(str(preset))
        if layers is None:
            given = f"{preset}: {names}"
            draft.leave(
                "layer_filter", given, Effect.CHANGES, "write the layers in method.lora_target_modules"
            )
            return
        source = "layer_filter_preset"
        if layers == "locon":
            note = "its layers; conv_in, conv_out and the time embedding are left out"
            draft.put("method.lora_target_modules", layers, source=source, note=note)
        else:
            put_layers(draft, layers, source=source, note="its layers")


def _own_options(settings: Settings) -> dict[str, tuple[str, Any]]:
    """Return the options of the optimizer that are set; the config lists those of all optimizers, mostly unused."""
    handled = ("optimizer", "fused_back_pass", "fused", "foreach", "capturable", "differentiable")
    names = (*handled, "stochastic_rounding", "muon_adam_config", "split_groups", "split_groups_mean")
    return {
        name: found
        for name, found in options_of(settings, "optimizer.").items()
        if name not in names and not is_off(found[1], (False,))
    }
