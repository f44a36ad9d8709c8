"""A model's shape without its weights: the parts on torch's meta device, made from configs or a file's header alone."""

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
from dreamfleet.trainers.models.condition import Condition
from dreamfleet.trainers.models.formats.layout import empty_part, from_single_file
from dreamfleet.trainers.models.formats.ldm_names import FAMILY_CONFIGS, Config, family_of
from dreamfleet.trainers.models.formats.single_file import configs_for
from dreamfleet.trainers.models.pretrained import pocket_folder
from dreamfleet.trainers.models.stable_diffusion.family import is_sdxl, refuse_other_families
from dreamfleet.trainers.models.stable_diffusion.loading import WEIGHTS
from dreamfleet.trainers.models.stable_diffusion.model import ALL_PARTS, StableDiffusion

NUM_TOKENS = 77  # of a prompt; CLIP's context length


class ShapeTokenizer:
    """Stands in for a tokenizer where only the shapes of ids count: every text is one token, or a full row padded."""

    model_max_length = NUM_TOKENS
    bos_token_id = eos_token_id = pad_token_id = unk_token_id = 0

    def __call__(self, text: str | Sequence[str], **options: Any) -> Any:
        """Return ``input_ids`` of a text ``[0]``, or of a list of texts as zeros ``[B, 77]``."""
        if isinstance(text, str):
            return SimpleNamespace(input_ids=[0])
        return SimpleNamespace(input_ids=torch.zeros(len(text), NUM_TOKENS, dtype=torch.long))


def model_shape(config: ModelConfig, needs: Collection[str] = ALL_PARTS) -> StableDiffusion:
    """Make the parts in ``needs`` on the meta device, frozen, in float32 as :func:`load_model` gives them.

    No weights are read: a folder's ``config.json`` files or a ``.safetensors`` header suffice, and nothing is
    downloaded. Raises ModelError for a model that is not here, or is of a family that methods cannot train.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    name = config.pretrained_model_name_or_path
    configs = _read_configs(name, config.revision)
    if other := config.pretrained_vae_model_name_or_path:
        configs["vae"] = _read_vae_config(other)
    refuse_other_families(configs, name)
    sdxl = is_sdxl(configs)
    parts: dict[str, Any] = dict.fromkeys(ALL_PARTS)
    for part in [*needs, *(["text_encoder_2"] if sdxl and "text_encoder" in needs else [])]:
        if part not in configs:
            raise ModelError(
                f"{name}: the part {part!r} has no config.json; a plan needs unet, vae, text_encoder, and SDXL's "
                "text_encoder_2"
            )
        try:
            parts[part] = empty_part(part, configs[part])
        except FormatError as error:
            raise ModelError(f"{name}: {error}") from error
    model = StableDiffusion(
        tokenizer=ShapeTokenizer(),
        tokenizer_2=ShapeTokenizer() if sdxl else None,
        scheduler=DDPMScheduler.from_config(
            configs.get("scheduler", FAMILY_CONFIGS[family_of(configs)]["scheduler"])
        ),
        folder=name,
        content_hash="",
        clip_skip=config.clip_skip,
        max_token_length=config.max_token_length,
        **parts,
    )
    model.freeze()
    return model


def empty_condition(model: StableDiffusion, num: int) -> Condition:
    """Make what the U-Net is told of ``num`` prompts and pictures, of the right shapes and types, with no meaning."""
    dtype = model.text_encoder.dtype
    context = torch.empty(num, NUM_TOKENS * model.num_chunks, model.context_width, dtype=dtype)
    if not model.is_sdxl:
        return Condition(context)
    pooled = torch.empty(num, model.text_encoder_2.config.projection_dim, dtype=dtype)
    return Condition(context, pooled, torch.zeros(num, 6))


def _read_configs(name: str, revision: str | None) -> dict[str, Config]:
    path = pocket_folder() if name == POCKET else Path(name).expanduser()
    if name.endswith(".safetensors") and "://" not in name:
        return _read_header(path)
    if name.endswith((".ckpt", ".safetensors")):
        raise ModelError(
            f"{name}: only a folder's configs or the header of a .safetensors on a disk tell a model's shape "
            "without loading it; convert the file (dreamfleet convert IN OUT) or copy it here"
        )
    if "://" in name or path.is_dir():
        return _read_folder(name if "://" in name else str(path))
    return _read_folder(str(_cached(name, revision)))


def _read_folder(folder: str) -> dict[str, Config]:
    storage = Storage(folder)
    files = {part: f"{part}/config.json" for part in WEIGHTS} | {
        "scheduler": "scheduler/scheduler_config.json"
    }
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
        raise ModelError(f"{storage.path(file)} is no config: a JSON object is expected")
    return {key: entry for key, entry in value.items() if not key.startswith("_")}


def _read_header(path: Path) -> dict[str, Config]:
    """Read a single file's configs, and check by the shapes in its header that it is whole."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ModelError(f"model.pretrained_model_name_or_path: there is no {path}")
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
            f"model.pretrained_model_name_or_path: {name!r} is no folder or file, and no model of the hub that was "
            "downloaded before; a plan downloads nothing. Give a folder with its config.json files, or run "
            "`dreamfleet check` once, which fetches the model"
        )
    return Path(found).parent.parent
