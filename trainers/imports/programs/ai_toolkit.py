"""Imports the YAML configs of ostris/ai-toolkit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dreamfleet.trainers.imports.draft import Draft
from dreamfleet.trainers.imports.image_sets import ImageSet, write_sets
from dreamfleet.trainers.imports.importer import Importer
from dreamfleet.trainers.imports.programs import ai_toolkit_keys
from dreamfleet.trainers.imports.programs.common import (
    options_of,
    put_length,
    put_options,
    put_output,
    refuse_family,
)
from dreamfleet.trainers.imports.rules import Effect, Table, number, plain
from dreamfleet.trainers.imports.settings import Document, Settings

_TRAINERS = ("sd_trainer", "ui_trainer", "diffusion_trainer", "textual_inversion_trainer", "fine_tune")
_TRAINED = ("sd1", "sd2", "sdxl", "sd15")


class AiToolkit(Importer):
    """Translates the first process of a config of ai-toolkit."""

    name: ClassVar[str] = "ai-toolkit"
    title: ClassVar[str] = "ai-toolkit"
    version: ClassVar[str] = "August 2026"
    rules: ClassVar[Table] = ai_toolkit_keys.RULES
    patterns: ClassVar[Table] = ai_toolkit_keys.PATTERNS
    markers: ClassVar[frozenset[str]] = frozenset(
        {"training_folder", "datasets.*.folder_path", "sample.walk_seed"}
    )
    defaults: ClassVar[Mapping[str, object]] = {
        "train.lr": 1e-6,
        "train.gradient_checkpointing": True,
        "save.save_every": 1000,
        "save.max_step_saves_to_keep": 5,
        "save.dtype": "float16",
    }

    def detect(self, document: Document) -> float:
        content = document.content
        is_job = isinstance(content, dict) and isinstance(content.get("config"), dict) and "job" in content
        return 2.0 if is_job and content["config"].get("process") else 0.0

    def flat(self, document: Document) -> object:
        """Return the settings of the first process, with the name of the job."""
        config = document.content["config"]
        processes = config["process"]
        flat: dict[str, Any] = {"name": config.get("name", "")}
        if isinstance(processes, list) and processes and isinstance(processes[0], dict):
            flat |= processes[0]
        if isinstance(processes, list) and len(processes) > 1:
            flat["more_processes"] = len(processes) - 1
        return flat

    def method(self, settings: Settings, documents: Sequence[Document]) -> str:
        kind = settings.get("type", "sd_trainer")
        if kind not in _TRAINERS:
            refuse_family(self.title, "type", kind)
        arch = settings.get("model.arch")
        other = [
            key for key in settings.found if key.startswith("model.is_") and plain(settings.get(key)) is True
        ]
        other = [key for key in other if key not in ("model.is_xl", "model.is_v2", "model.is_v_pred")]
        if (arch is not None and arch not in _TRAINED) or other:
            refuse_family(self.title, other[0] if other else "model.arch", arch or "true")
        if settings.get("train.noise_scheduler") == "flowmatch":
            refuse_family(self.title, "train.noise_scheduler", "flowmatch")
        if kind == "textual_inversion_trainer" or settings.has("embedding.trigger"):
            return "textual_inversion"
        reg = settings.found.get("datasets.*.is_reg", [])
        return "dreambooth" if any(plain(item.value) is True for item in reg) else "native"

    def finish(self, settings: Settings, draft: Draft) -> None:
        self._finish_images(settings, draft)
        self._finish_length(settings, draft)
        put_options(draft, options_of(settings, "train.optimizer_params."))
        put_output(
            draft,
            settings.get("training_folder", "output"),
            settings.get("name"),
            source="training_folder, name",
        )
        rate, source = settings.get("train.unet_lr"), "train.unet_lr"
        if rate is None:
            rate, source = settings.get("train.lr"), "train.lr"
        given = rate is not None
        draft.put("optimizer.learning_rate", rate if given else 1e-6, source=source, is_default=not given)
        if settings.has("network.type") or settings.has("network.linear") or settings.has("network.rank"):
            self._finish_network(settings, draft)
        prompts = [self._filled(settings, str(text)) for text in settings.get("sample.prompts", [])]
        prompts += [
            self._filled(settings, str(item.value))
            for item in settings.found.get("sample.samples.*.prompt", [])
        ]
        if prompts and plain(settings.get("train.disable_sampling")) is not True:
            draft.put("validation.prompts", prompts, source="sample.prompts")
        if draft.method == "textual_inversion":
            word = settings.get("embedding.trigger", "custom_embedding")
            draft.put("method.placeholder_token", word, source="embedding.trigger")

    def _finish_length(self, settings: Settings, draft: Draft) -> None:
        steps = number(settings.get("train.steps", 1000))
        every = number(settings.get("train.gradient_accumulation_steps", 1))
        inner = number(settings.get("train.gradient_accumulation", 1))
        note = f"{steps:g} batches there, {every:g} of them for each optimizer step" if every > 1 else ""
        put_length(draft, steps=max(1, steps // every), source="train.steps", note=note)
        if every * inner > 1:
            draft.put(
                "train.gradient_accumulation_steps", int(every * inner), source="train.gradient_accumulation"
            )

    def _finish_network(self, settings: Settings, draft: Draft) -> None:
        kind = str(settings.get("network.type", "lora"))
        if kind not in ("lora", "locon"):
            draft.put("method.lora_type", kind, source="network.type", shown=kind)
        if kind == "lokr" and settings.get("network.lokr_full_rank", True) is True:
            is_default = not settings.has("network.lokr_full_rank")
            key = "method.lokr_full_matrix"
            draft.put(key, True, source="network.lokr_full_rank", is_default=is_default)
        rank = number(settings.get("network.linear", settings.get("network.rank", 4)))
        alpha = settings.get("network.linear_alpha", settings.get("network.alpha"))
        draft.put("method.lora_rank", int(rank), source="network.linear")
        source = "network.linear_alpha"
        draft.put("method.lora_alpha", number(alpha or 1), source=source, is_default=alpha is None)
        conv = settings.get("network.conv")
        layers = "locon" if conv else "all-linear"
        note = "its layers; the embedding of timesteps is left out"
        draft.put("method.lora_target_modules", layers, source="network", note=note)
        if conv and number(conv) != rank:
            draft.leave(
                "network.conv", conv, Effect.CHANGES, f"all layers have the same rank: {rank:g} is used"
            )

    def _finish_images(self, settings: Settings, draft: Draft) -> None:
        sets = []
        sizes: list[int] = []
        for item in settings.found.get("datasets.*.folder_path", []):
            at = settings.below(item.where.rpartition(".")[0])
            given = at("resolution", 512)
            sizes += [int(number(size)) for size in (given if isinstance(given, list) else [given])]
            caption = at("default_caption", settings.get("trigger_word"))
            sets.append(
                ImageSet(
                    item.where,
                    str(item.value),
                    prompt=self._filled(settings, str(caption)) if caption else None,
                    repeats=int(number(at("num_repeats", 1))),
                    is_class=plain(at("is_reg")) is True,
                    masks=at("mask_path"),
                )
            )
        if sizes:
            draft.put("data.resolution", max(sizes), source="datasets.*.resolution")
            if len(set(sizes)) > 1:
                reason = f"all images have one resolution; the largest, {max(sizes)}, is used"
                draft.leave("datasets.*.resolution", sorted(set(sizes)), Effect.CHANGES, reason)
            buckets = any(
                plain(each.value) is not False for each in settings.found.get("datasets.*.buckets", [])
            )
            if buckets or "datasets.*.buckets" not in settings.found:
                draft.put("data.enable_bucket", True, source="datasets.*.buckets", is_default=not buckets)
        write_sets(draft, sets)
        if word := settings.get("trigger_word"):
            reason = "captions are used as they are: write the word into them (or set data.caption_prefix)"
            draft.leave("trigger_word", word, Effect.CHANGES, reason)

    @staticmethod
    def _filled(settings: Settings, text: str) -> str:
        word = settings.get("trigger_word", settings.get("embedding.trigger"))
        return text.replace("[trigger]", str(word)) if word else text
