"""Builds a model without weights: its parts on torch's meta device, from config files or a file's header."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dreamfleet.datasets.errors import FormatError, ModelError, StorageError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.model import POCKET, ModelConfig
from dreamfleet.trainers.models.formats.layout import empty_part, from_single_file
from dreamfleet.trainers.models.formats.ldm_names import FAMILY_CONFIGS, Config
from dreamfleet.trainers.models.formats.single_file import configs_for
from dreamfleet.trainers.models.pretrained import pocket_folder
from dreamfleet.trainers.models.stable_diffusion.model import PARTS, StableDiffusion
from dreamfleet.trainers.models.stable_diffusion.sdxl import make_model
from dreamfleet.trainers.models.stable_diffusion.variants import parts_needed, require_supported

NUM_TOKENS = 77  # CLIP's context length


class ShapeTokenizer:
    """A stand-in for CLIP's tokenizer that returns token ids of the right shape and no meaning."""

    model_max_length = NUM_TOKENS
    bos_token_id = eos_token_id = pad_token_id = unk_token_id = 0

    def __call__(self, text: str | Sequence[str], **options: Any) -> Any:
        """Return ``input_ids``: ``[0]`` for a text, zeros ``[B, 77]`` for a list of texts."""
        if isinstance(text, str):
            return SimpleNamespace(input_ids=[0])
        return SimpleNamespace(input_ids=torch.zeros(len(text), NUM_TOKENS, dtype=torch.long))


def load_shape(config: ModelConfig, needs: Collection[str]) -> StableDiffusion:
    """Build the components in ``needs`` on the meta device, frozen and in float32, as loading the model would.

    Only a folder's ``config.json`` files or a ``.safetensors`` header are read; nothing is downloaded. Raises
    ModelError for a model that is not on this machine or cannot be trained.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    name = config.pretrained_model_name_or_path
    configs = _read_configs(name, config.revision)
    if other := config.pretrained_vae_model_name_or_path:
        configs["vae"] = _read_vae_config(other)
    family = require_supported(configs, name)
    parts: dict[str, Any] = {}
    for part in parts_needed(family, needs):
        if part not in configs:
            raise ModelError(
                f"{name}: the part {part!r} has no config.json; a plan needs unet, vae, text_encoder, and SDXL's "
                "text_encoder_2"
            )
        try:
            parts[part] = empty_part(part, configs[part])
        except FormatError as error:
            raise ModelError(f"{name}: {error}") from error
    model = make_model(
        family,
        {**parts, "tokenizer": ShapeTokenizer(), "tokenizer_2": ShapeTokenizer()},
        scheduler=DDPMScheduler.from_config(configs.get("scheduler", FAMILY_CONFIGS[family]["scheduler"])),
        name=name,
    )
    model.clip_skip, model.max_token_length = config.clip_skip, config.max_token_length
    model.freeze()
    return model


def _read_configs(name: str, revision: str | None) -> dict[str, Config]:
    path = pocket_folder() if name == POCKET else Path(name).expanduser()
    if name.endswith(".safetensors") and "://" not in name:
        return _read_header(path)
    if name.endswith((".ckpt", ".safetensors")):
        raise ModelError(
            f"{name}: the shape of a model can be read without loading it only from a folder's configs or the header "
            "of a local .safetensors file; convert the file (dreamfleet convert IN OUT) or copy it to this machine"
        )
    if "://" in name or path.is_dir():
        return _read_folder(name if "://" in name else str(path))
    return _read_folder(str(_cached(name, revision)))


def _read_folder(folder: str) -> dict[str, Config]:
    storage = Storage(folder)
    files = {part: f"{part}/config.json" for part in PARTS} | {"scheduler": "scheduler/scheduler_config.json"}
    found = {part: _read_json(storage, file) for part, file in files.items() if storage.exists(file)}
    if "unet" not in found:
        raise ModelError(
            f"{folder}: no unet/config.json; a plan needs the config.json of unet/, vae/ and text_encoder/"
        )
    return found


def _read_vae_config(folder: str) -> Config:
    storage = Storage(folder)
    for file in ("vae/config.json", "config.json"):
        if storage.exists(file):
            return _read_json(storage, file)
    raise ModelError(f"model.pretrained_vae_model_name_or_path: no config.json in {folder}")


def _read_json(storage: Storage, file: str) -> Config:
    try:
        value = json.loads(storage.read_text(file))
    except (StorageError, ValueError) as error:
        raise ModelError(f"{storage.path(file)} is not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{storage.path(file)} is not a config; a JSON object is expected")
    return {key: entry for key, entry in value.items() if not key.startswith("_")}


def _read_header(path: Path) -> dict[str, Config]:
    """Return the configs of a single file after checking the shapes in its header against them.

    Raises ModelError if the file is missing, damaged, or not a supported model.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ModelError(f"model.pretrained_model_name_or_path: {path} does not exist")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = dict(file.metadata() or {})
            names = list(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error})") from error
    tensors: dict[str, Tensor] = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        configs = configs_for(tensors, header, path)
        from_single_file(tensors, configs)
    except FormatError as error:
        raise ModelError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    return configs


def _cached(name: str, revision: str | None) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "unet/config.json", revision=revision)
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise ModelError(
            f"model.pretrained_model_name_or_path: {name!r} is neither a folder or file nor a hub model in the local "
            "cache, and a plan downloads nothing. Give a folder with its config.json files, or run `dreamfleet check` "
            "once, which downloads the model"
        )
    return Path(found).parent.parent
