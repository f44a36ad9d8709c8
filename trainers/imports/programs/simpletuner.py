"""Imports SimpleTuner's `config.json` and the data backends that it names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dreamfleet.trainers.imports.draft import Draft
from dreamfleet.trainers.imports.image_sets import ImageSet, write_sets
from dreamfleet.trainers.imports.importer import Importer
from dreamfleet.trainers.imports.programs import simpletuner_keys
from dreamfleet.trainers.imports.programs.common import put_length, put_resolution, refuse_family
from dreamfleet.trainers.imports.rules import Effect, Table, is_off, number, plain
from dreamfleet.trainers.imports.settings import Document, Settings

_TRAINED = ("sd1x", "sd2x", "sdxl")


class SimpleTuner(Importer):
    """Translates the settings of SimpleTuner."""

    name: ClassVar[str] = "simpletuner"
    title: ClassVar[str] = "SimpleTuner"
    version: ClassVar[str] = "August 2026"
    kinds: ClassVar[tuple[str, ...]] = ("json",)
    rules: ClassVar[Table] = simpletuner_keys.RULES
    patterns: ClassVar[Table] = simpletuner_keys.PATTERNS
    named_files: ClassVar[tuple[str, ...]] = ("data_backend_config", "lycoris_config")
    markers: ClassVar[frozenset[str]] = frozenset(
        {
            "model_family",
            "data_backend_config",
            "backends.*.metadata_backend",
            "backends.*.caption_strategy",
            "lora_type",
        }
    )
    defaults: ClassVar[Mapping[str, object]] = {
        "train_batch_size": 4,
        "learning_rate": 4e-7,
        "lr_scheduler": "constant_with_warmup",
        "mixed_precision": "bf16",
        "max_grad_norm": 2.0,
        "gradient_checkpointing": True,
        "checkpoints_total_limit": 5,
    }

    def flat(self, document: Document) -> object:
        """Return the options without dashes; a list holds data backends, another file LyCORIS's options."""
        content = document.content
        if isinstance(content, list):
            return {"backends": content}
        if document.role == "lycoris_config":
            return {"lycoris": content}
        inner = content.get("config")
        content = inner if isinstance(inner, dict) else content
        return {key.lstrip("-").replace("-", "_"): value for key, value in content.items()}

    def method(self, settings: Settings, documents: Sequence[Document]) -> str:
        family = settings.get("model_family")
        if family is not None and family not in _TRAINED:
            refuse_family(self.title, "model_family", family)
        for key in ("controlnet", "control", "refiner_training"):
            if plain(settings.get(key)) is True:
                refuse_family(self.title, key, "true")
        types = [item.value for item in settings.found.get("backends.*.is_regularisation_data", [])]
        return "dreambooth" if any(plain(value) is True for value in types) else "native"

    def defaults_for(self, settings: Settings) -> Mapping[str, object]:
        own = dict(self.defaults)
        if settings.get("model_type") == "lora":
            own |= {"lora_rank": 16, "lora_dropout": 0.1}
        return own

    def finish(self, settings: Settings, draft: Draft) -> None:
        self._finish_images(settings, draft)
        steps, epochs = settings.get("max_train_steps"), settings.get("num_train_epochs")
        if not is_off(steps, (0, -1)):
            put_length(draft, steps=steps, source="max_train_steps")
        elif not is_off(epochs, (0,)):
            put_length(draft, epochs=epochs, source="num_train_epochs")
        if plain(settings.get("offset_noise")) is True:
            draft.put("train.noise_offset", settings.get("noise_offset", 0.1), source="noise_offset")
            chance = settings.get("noise_offset_probability", 0.25)
            if number(chance) != 1:
                reason = "the offset is added to every image, not with a probability"
                draft.leave("noise_offset_probability", chance, Effect.CHANGES, reason)
        if settings.get("grad_clip_method", "value") == "value" and not is_off(
            settings.get("max_grad_norm"), (0,)
        ):
            reason = "there each value is clipped, here their norm"
            draft.leave("grad_clip_method", "value", Effect.CHANGES, reason)
        if settings.get("lora_type") == "lycoris":
            algo = settings.get("lycoris.algo", "lokr")
            draft.put("method.lora_type", algo, source="lycoris_config: algo", shown=algo)
            if (rank := settings.get("lycoris.linear_dim")) is not None:
                draft.replace("method.lora_rank", int(number(rank)), source="lycoris_config: linear_dim")
            if (alpha := settings.get("lycoris.linear_alpha")) is not None:
                draft.replace("method.lora_alpha", number(alpha), source="lycoris_config: linear_alpha")
        if settings.get("model_type") == "lora" and settings.has("lora_alpha"):
            draft.put("method.lora_alpha", settings.get("lora_alpha"), source="lora_alpha")
        if draft.get("train.loss_type") in ("huber", "smooth_l1"):
            draft.put("train.huber_schedule", settings.get("huber_schedule", "snr"), source="huber_schedule")
            draft.put("train.huber_c", settings.get("huber_c", 0.1), source="huber_c")
        folder = settings.get("output_dir", "simpletuner-results")
        draft.put("output_dir", folder, source="output_dir")

    def _finish_images(self, settings: Settings, draft: Draft) -> None:
        sets: list[ImageSet] = []
        sizes: list[tuple[str, Any, str]] = []
        for item in settings.found.get("backends.*.id", []):
            place = item.where.rpartition(".")[0]
            at = settings.below(place)
            if at("dataset_type", "image") in ("text_embeds", "image_embeds") or at("disabled") is True:
                continue
            if at("dataset_type", "image") != "image":
                draft.leave(item.where, at("dataset_type"), Effect.CHANGES, "only images are trained on")
                continue
            sizes.append(
                (
                    f"{place}.resolution",
                    at("resolution", settings.get("resolution", 1024)),
                    at("resolution_type", ""),
                )
            )
            sets += _image_set(draft, place, at)
        if sizes:
            where, value, kind = sizes[0]
            _write_resolution(draft, where, value, kind or str(settings.get("resolution_type", "pixel_area")))
            for other, size, _ in sizes[1:]:
                if size != value:
                    draft.leave(
                        other, size, Effect.CHANGES, f"all images have one resolution, that of {where}"
                    )
        elif settings.has("resolution"):
            kind = str(settings.get("resolution_type", "pixel_area"))
            _write_resolution(draft, "resolution", settings.get("resolution"), kind)
        crops = [plain(item.value) for item in settings.found.get("backends.*.crop", [])]
        if not any(crop is True for crop in crops):
            draft.put(
                "data.enable_bucket", True, source="crop", note="without crop there are aspect buckets there"
            )
        write_sets(draft, sets)


def _image_set(draft: Draft, place: str, at: Any) -> list[ImageSet]:
    kind, strategy = at("type", "local"), at("caption_strategy", "filename")
    path = {
        "local": at("instance_data_dir"),
        "aws": f"s3://{at('aws_bucket_name', '')}/{at('aws_data_prefix', '') or ''}".rstrip("/"),
        "huggingface": at("dataset_name"),
    }.get(kind)
    if kind == "huggingface":
        reason = "datasets of the hub are not read by name: download it, and set data.instance_data_dir"
        draft.leave(f"{place}.dataset_name", path, Effect.BLOCKS, reason)
        path = None
    elif path is None:
        draft.leave(f"{place}.type", kind, Effect.BLOCKS, "there is no such source of images here")
    if strategy == "filename":
        draft.put("data.caption_from_filename", True, source=f"{place}.caption_strategy")
    elif strategy in ("parquet", "csv", "huggingface"):
        reason = "a column of a table beside the images, or caption files: data.caption_column"
        draft.leave(f"{place}.caption_strategy", strategy, Effect.CHANGES, reason)
    prompt = at("instance_prompt") if strategy == "instanceprompt" or at("only_instance_prompt") else None
    if prompt and path is None:
        draft.put("data.instance_prompt", prompt, source=f"{place}.instance_prompt")
    if prompt:
        draft.put(
            "data.use_captions", False, source=f"{place}.caption_strategy", note="one prompt for all images"
        )
    repeats = int(number(at("repeats", 0) or 0)) + 1
    if path is None:
        return []
    found = ImageSet(
        f"{place}.instance_data_dir",
        os.path.expanduser(str(path)),
        prompt=prompt,
        repeats=repeats,
        is_class=plain(at("is_regularisation_data")) is True,
    )
    return [found]


def _write_resolution(draft: Draft, where: str, value: Any, kind: str) -> None:
    """Write the resolution, which is a side in pixels, or with ``area`` a number of megapixels."""
    size = number(value)
    if kind == "area" or size < 8:
        side = round((size * 1_000_000) ** 0.5 / 64) * 64
        note = f"{size:g} megapixels there, the side of a square of that area here"
        draft.put("data.resolution", side, source=where, note=note)
    else:
        note = "the shorter side there, the side of a square of equal area here" if kind == "pixel" else ""
        put_resolution(draft, where, int(size))
        if note and draft.lines.get("data.resolution"):
            draft.replace("data.resolution", int(size), source=where, note=note)
