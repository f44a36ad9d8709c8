"""Writes a model as the folder that diffusers' pipelines load, with transformers 4 as well as 5.

transformers 5 writes a text encoder without the level `text_model.` and a tokenizer as `tokenizer.json` alone. Version
4 finds none of these weights, warns, and continues with random ones; it needs `vocab.json` and `merges.txt` too. Both
versions read what is written here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from dreamfleet.trainers.models.formats.tensor_files import write_safetensors
from dreamfleet.trainers.models.stable_diffusion import embeddings
from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion

# Models that hold their parts one level lower in version 4, by class; version 5 reads both.
_LOWER = {"CLIPTextModel": "text_model.", "CLIPVisionModel": "vision_model."}
_OF_THIS_MACHINE = (
    "backend",
    "is_local",
    "local_files_only",
)  # transformers 5's notes in a tokenizer's config


def save_pipeline(model: StableDiffusion, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a folder that ``StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)`` loads.

    Of an SDXL, one that ``StableDiffusionXLPipeline`` loads. Weights are cast to ``dtype`` one by one while they are
    written (each part keeps its own when None).
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    embeddings.remove_embeddings(model)
    noise = DDIMScheduler.from_config(model.scheduler.config)
    tokenizers = {"tokenizer": model.tokenizer, "tokenizer_2": model.tokenizer_2}
    tokenizers = {name: tokenizer for name, tokenizer in tokenizers.items() if tokenizer is not None}
    parts: dict[str, Any] = {**model.modules(), **tokenizers, "scheduler": noise}
    _pipeline(parts, zeros_for_empty_prompt=model.zeros_for_empty_prompt).save_config(folder)
    noise.save_pretrained(folder / "scheduler")
    for name, part in model.modules().items():
        save_part(part, folder / name, dtype=dtype)
    for name, tokenizer in tokenizers.items():
        save_tokenizer(tokenizer, folder / name)


def save_part(
    part: Any,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    header: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write the config and the weights of a model of diffusers or transformers, as the versions of both read them.

    All weights are in one file: early versions of diffusers read none that are split. ``more`` are entries that join a
    config of transformers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(part, "save_config"):  # diffusers'
        part.save_config(folder)
        _drop(folder / "config.json", ("_name_or_path",))  # the folder it was loaded from
        path = folder / "diffusion_pytorch_model.safetensors"
        write_safetensors(part.state_dict(), path, dtype=dtype, header=header)
        return
    config = {**part.config.to_diff_dict(), "architectures": [type(part).__name__], **(more or {})}
    config = {key: value for key, value in config.items() if key not in ("dtype", "_name_or_path")}
    # Also over 16-bit weights: version 5 computes in this precision unless told otherwise, diffusers' parts in float32.
    config["torch_dtype"] = "float32"
    _write_json(folder / "config.json", config)
    lower = _LOWER.get(type(part).__name__, "")
    state = {lower + key.removeprefix(lower): tensor for key, tensor in part.state_dict().items()}
    write_safetensors(state, folder / "model.safetensors", dtype=dtype, header=header)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a CLIP tokenizer in the forms of transformers 5 (`tokenizer.json`) and 4 (`vocab.json`, `merges.txt`)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
    ordered = dict(sorted(vocab.items(), key=lambda entry: entry[1]))
    (folder / "vocab.json").write_text(json.dumps(ordered, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(pair if isinstance(pair, str) else " ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    added = {
        token["content"]: token["id"] for token in whole["added_tokens"] if token["content"] not in vocab
    }
    if added:
        (folder / "added_tokens.json").write_text(json.dumps(added, ensure_ascii=False), "utf-8")
    path = folder / "tokenizer_config.json"
    config = _drop(path, _OF_THIS_MACHINE)
    if isinstance(special := config.get("extra_special_tokens"), list):  # version 4 expects a table there
        config["additional_special_tokens"] = special
        del config["extra_special_tokens"]
    _write_json(path, config)


def _pipeline(parts: dict[str, Any], *, zeros_for_empty_prompt: bool) -> Any:
    """Make diffusers' pipeline of the parts, which knows what its index says."""
    if "tokenizer_2" in parts:
        from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
            StableDiffusionXLPipeline,
        )

        return StableDiffusionXLPipeline(
            **parts, force_zeros_for_empty_prompt=zeros_for_empty_prompt, add_watermarker=False
        )
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _drop(path: Path, keys: Collection[str]) -> dict[str, Any]:
    """Take entries out of a JSON file -> what it says now."""
    kept = {key: value for key, value in json.loads(path.read_text("utf-8")).items() if key not in keys}
    _write_json(path, kept)
    return kept


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
