"""Creates and reads the header of a single file: model description, configs of the parts, small tokenizers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamfleet.datasets.errors import FormatError, ModelError
from dreamfleet.trainers.models.formats.ldm_names import PARTS, Config, Family, family_of

SD1_TOKENIZER = "openai/clip-vit-large-patch14"
_TOKENIZERS = ("tokenizer", "tokenizer_2")
LARGEST_TOKENIZER = 20_000  # tokens; larger tokenizers are SD1's and not stored, since every program has it


def config_of(module: Any) -> Config:
    """Return a part's config as plain JSON values, without the path that it was loaded from."""
    config = module.config
    full = config.to_diff_dict() if hasattr(config, "to_diff_dict") else dict(config)
    full = {
        key: value for key, value in full.items() if not key.startswith("_") and key != "transformers_version"
    }
    return json.loads(json.dumps(full, default=str))


def model_header(
    configs: Mapping[str, Config],
    *,
    scheduler: Mapping[str, Any],
    tokenizers: Mapping[str, Any],
    resolution: int,
    title: str,
) -> dict[str, str]:
    """Return the header entries of a model: modelspec's, the configs of its parts, and its tokenizers if small.

    ``scheduler``: the config of the noise schedule. ``tokenizers``: by name (``tokenizer``, ``tokenizer_2``).
    ``resolution``: side of the training images in pixels.
    """
    prediction = scheduler["prediction_type"]
    header = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _architecture(family_of(configs), velocity=prediction == "v_prediction"),
        "modelspec.title": title,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction,
    }
    schedule = {key: value for key, value in scheduler.items() if not key.startswith("_")}
    for part, config in {**configs, "scheduler": schedule}.items():
        header[f"dreamfleet.{part}_config"] = json.dumps(config, sort_keys=True)
    for name, tokenizer in tokenizers.items():
        if len(tokenizer) <= LARGEST_TOKENIZER:
            with tempfile.TemporaryDirectory(prefix="dreamfleet-") as folder:
                tokenizer.save_pretrained(folder)
                files = {file.name: file.read_text("utf-8") for file in sorted(Path(folder).glob("*"))}
            header[f"dreamfleet.{name}"] = json.dumps(files)
    return header


def configs_in(metadata: Mapping[str, str], path: Path) -> dict[str, Config]:
    """Return the configs that `model_header` wrote. Raises FormatError for damaged ones."""
    names = {part: f"dreamfleet.{part}_config" for part in (*PARTS, "scheduler")}
    return {part: _json(metadata[name], path) for part, name in names.items() if name in metadata}


def tokenizer_in(metadata: Mapping[str, str], path: Path, family: Family, *, second: bool = False) -> Any:
    """Return the tokenizer in a header, otherwise SD1's, which all families use, from this machine or the hub.

    `second`: that of SDXL's second text encoder. Raises ModelError if SD1's is needed and not available.
    """
    from transformers import CLIPTokenizer

    if whole := metadata.get("dreamfleet." + _TOKENIZERS[second]):
        with tempfile.TemporaryDirectory(prefix="dreamfleet-") as folder:
            try:
                for name, text in _json(whole, path).items():
                    (Path(folder) / Path(name).name).write_text(str(text), "utf-8")
                return CLIPTokenizer.from_pretrained(folder)
            except Exception as error:  # invalid content of a file can raise any exception
                raise FormatError(
                    f"{path}: the tokenizer in its header cannot be loaded ({error})."
                ) from error
    try:
        # OpenCLIP pads with zeros, the id of "!".
        padding = {"pad_token": "!"} if family == "sd2" or second else {}
        return CLIPTokenizer.from_pretrained(SD1_TOKENIZER, **padding)
    except Exception as error:  # the types of errors differ between versions
        raise ModelError(
            f"{path}: a single file holds no tokenizer, and SD1's ({SD1_TOKENIZER}) is neither on this machine nor "
            "available from the hub. Download it once with network access, or use the model's diffusers folder."
        ) from error


def _architecture(family: Family, *, velocity: bool) -> str:
    return {
        "sd1": "stable-diffusion-v1",
        "sd2": "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512",
        "sdxl": "stable-diffusion-xl-v1-base",
    }[family]


def _json(text: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: its header is damaged ({error}).") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: its header is damaged (expected an object).")
    return value
