"""Writes model parts in the folder layout of diffusers and transformers, and locates the bundled pocket model.

transformers 5 writes text encoders without the level `text_model.` in parameter names, and tokenizers as
`tokenizer.json` only. Version 4 does not recognise these weights and continues with random ones after a warning; it
also needs `vocab.json` and `merges.txt`. The functions here write files that both versions read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from dreamfleet.trainers.models.formats.tensor_files import write_safetensors

# The prefix of parameter names that version 4 expects, by class; version 5 accepts names with and without it.
_LEVELS = {"CLIPTextModel": "text_model.", "CLIPVisionModel": "vision_model."}
# Entries of a tokenizer's config in which transformers 5 records how it was loaded on this machine.
_LOCAL_ENTRIES = ("backend", "is_local", "local_files_only")


def pocket_folder() -> Path:
    """Return the folder of the pocket model, a small base model that is part of the package."""
    return Path(__file__).parent / "pocket"


def quiet_libraries() -> None:
    """Disable the progress bars and messages that diffusers and transformers print for each loaded part."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    if not torch.cuda.is_available():
        # Saving a model makes accelerate import DeepSpeed, which otherwise prints to stdout that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message (at most 300 characters), or its type where the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def save_part(
    part: Any,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    header: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write the config and weights of a diffusers or transformers model, readable by all supported versions.

    All weights are in one file, since early versions of diffusers do not read sharded weights. ``dtype``: precision of
    the weights, None for the part's own. ``header``: text entries of the safetensors header. ``more``: additional
    entries of a transformers config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(part, "save_config"):  # diffusers
        part.save_config(folder)
        _remove_entries(folder / "config.json", ("_name_or_path",))  # the path that the part was loaded from
        path = folder / "diffusion_pytorch_model.safetensors"
        write_safetensors(part.state_dict(), path, dtype=dtype, header=header)
        return
    config = {**part.config.to_diff_dict(), "architectures": [type(part).__name__], **(more or {})}
    config = {key: value for key, value in config.items() if key not in ("dtype", "_name_or_path")}
    # Also for 16-bit weights: version 5 computes in this precision by default, whereas diffusers' parts compute in
    # float32.
    config["torch_dtype"] = "float32"
    _write_json(folder / "config.json", config)
    level = _LEVELS.get(type(part).__name__, "")
    state = {level + key.removeprefix(level): tensor for key, tensor in part.state_dict().items()}
    write_safetensors(state, folder / "model.safetensors", dtype=dtype, header=header)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a CLIP tokenizer for transformers 5 (`tokenizer.json`) and 4 (`vocab.json`, `merges.txt`)."""
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
    config = _remove_entries(path, _LOCAL_ENTRIES)
    if isinstance(
        special := config.get("extra_special_tokens"), list
    ):  # version 4 expects a dict under this key
        config["additional_special_tokens"] = special
        del config["extra_special_tokens"]
    _write_json(path, config)


def _remove_entries(path: Path, keys: Collection[str]) -> dict[str, Any]:
    """Remove entries from a JSON file and return the rest."""
    kept = {key: value for key, value in json.loads(path.read_text("utf-8")).items() if key not in keys}
    _write_json(path, kept)
    return kept


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
