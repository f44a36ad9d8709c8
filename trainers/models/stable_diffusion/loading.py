"""Loads Stable Diffusion from a diffusers folder, a single file, the Hugging Face hub or a bucket."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dreamfleet.datasets.errors import ModelError
from dreamfleet.datasets.storage.node_cache import node_copy
from dreamfleet.trainers.config.model import POCKET, ModelConfig
from dreamfleet.trainers.models.formats.ldm_names import Config
from dreamfleet.trainers.models.pretrained import first_line, pocket_folder
from dreamfleet.trainers.models.stable_diffusion import meta_model
from dreamfleet.trainers.models.stable_diffusion.fingerprints import fingerprint, short_hash, vae_fingerprint
from dreamfleet.trainers.models.stable_diffusion.model import PARTS, SINGLE_FILES, StableDiffusion
from dreamfleet.trainers.models.stable_diffusion.noise_schedule import noise_schedule
from dreamfleet.trainers.models.stable_diffusion.sdxl import make_model
from dreamfleet.trainers.models.stable_diffusion.single_file import load_single_file
from dreamfleet.trainers.models.stable_diffusion.variants import parts_needed, require_supported

_CONFIGS = {
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}


class StableDiffusionFamily:
    """Loads Stable Diffusion 1.x, 2.x and XL. As the default family it also reports unknown and missing models."""

    def recognises(self, config: ModelConfig) -> bool:
        return True

    def load(self, config: ModelConfig, needs: Collection[str]) -> StableDiffusion:
        """Load the components in ``needs`` in float32, frozen.

        Raises ModelError with the name of the model and of the part that is missing or broken.
        """
        name = config.pretrained_model_name_or_path
        if not needs:
            return make_model("sd1", {}, scheduler=None, name=name)
        if name == POCKET:
            return _load_path(pocket_folder(), name, config, needs)
        if "://" in name:
            with node_copy(name) as local:
                model = _load_path(local, name, config, needs)
                digest = model.short_hash()  # while the local copy certainly exists
                model.hash_file = lambda: digest
                return model
        path = Path(name).expanduser()
        return _load_path(path if path.exists() else _download(name, config), name, config, needs)

    def load_shape(self, config: ModelConfig, needs: Collection[str]) -> StableDiffusion:
        return meta_model.load_shape(config, needs)


FAMILY = StableDiffusionFamily()


def _load_path(path: Path, name: str, config: ModelConfig, needs: Collection[str]) -> StableDiffusion:
    """Load a model from a local folder or file and apply the other options of the ``model:`` section to it."""
    if path.is_dir():
        model = _load_folder(path, name, config, needs)
    elif path.suffix in SINGLE_FILES:
        model = load_single_file(path, name=name, needs=parts_needed("sd1", needs))
    else:
        raise ModelError(f"{name}: not a model; expected a diffusers folder, a .safetensors or a .ckpt file")
    model.content_hash, model.encoder_hash = fingerprint(path, PARTS), vae_fingerprint(model.vae)
    model.hash_file = partial(short_hash, path)
    model.clip_skip, model.max_token_length = config.clip_skip, config.max_token_length
    model.scheduler = noise_schedule(model.scheduler, config, model.folder)
    model.freeze()
    return model


def _load_folder(folder: Path, name: str, config: ModelConfig, needs: Collection[str]) -> StableDiffusion:
    """Load the components in ``needs`` of a diffusers folder, its tokenizers and its noise schedule."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    classes: dict[str, Any] = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
        "scheduler": DDPMScheduler,
    }
    family = require_supported(_read_configs(folder), name)
    wanted = [*parts_needed(family, needs), "tokenizer", "scheduler"]
    if family == "sdxl":
        wanted.append("tokenizer_2")
    _require_parts(folder, name, wanted)

    def load(part: str, root: Path, **options: Any) -> Any:
        try:
            return classes[part].from_pretrained(root, local_files_only=True, **options)
        except Exception as error:  # the libraries raise many types for a damaged file or config
            raise ModelError(f"{name}: the part {part!r} cannot be loaded: {first_line(error)}") from error

    whole: dict[str, Any] = {"torch_dtype": torch.float32}
    variant = {"variant": config.variant} if config.variant else {}
    parts = {
        part: load(part, folder / part, **({**whole, **variant} if part in PARTS else {})) for part in wanted
    }
    if config.pretrained_vae_model_name_or_path and "vae" in needs:
        other = Path(config.pretrained_vae_model_name_or_path)
        if not other.is_dir():
            raise ModelError(f"model.pretrained_vae_model_name_or_path: no such folder: {other}")
        parts["vae"] = load("vae", other / "vae" if (other / "vae").is_dir() else other, **whole)
    model = make_model(family, parts, scheduler=parts["scheduler"], name=name)
    if family == "sdxl":
        index = _read_json(folder / "model_index.json")
        model.zeros_for_empty_prompt = bool(index.get("force_zeros_for_empty_prompt", True))
    return model


def _download(name: str, config: ModelConfig) -> Path:
    """Download a model from the hub and return its folder in the local cache. Raises ModelError."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith(SINGLE_FILES)
    if looks_like_path:
        raise ModelError(
            f"the model {name} (--model, or model.pretrained_model_name_or_path in a recipe) does not exist; give "
            f"'pocket', a folder, a .safetensors or .ckpt file, or a hub name such as "
            f"'stable-diffusion-v1-5/stable-diffusion-v1-5'"
        )
    from huggingface_hub import snapshot_download

    patterns = [f"{part}/*" for part in (*PARTS, *_CONFIGS)] + ["model_index.json"]
    try:
        return Path(snapshot_download(name, revision=config.revision, allow_patterns=patterns))
    except (
        Exception
    ) as error:  # the types of network, authorisation and not-found errors vary between versions
        raise ModelError(
            f"the model {name!r} (--model, or model.pretrained_model_name_or_path in a recipe) is not a local folder, "
            f"and cannot be downloaded from the hub ({first_line(error)}); download it where there is a network, or "
            "set HF_TOKEN if it is gated"
        ) from error


def _read_configs(folder: Path) -> Mapping[str, Config]:
    # A damaged config.json is read as {}; _require_parts reports it.
    files = {part: folder / part / "config.json" for part in PARTS}
    return {part: _read_json(file) for part, file in files.items() if file.is_file()}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _require_parts(folder: Path, name: str, parts: Sequence[str]) -> None:
    for part in parts:
        wanted = folder / part / _CONFIGS.get(part, "config.json")
        if not wanted.is_file():
            raise ModelError(
                f"{name}: the part {part!r} is missing ({wanted} not found); a Stable Diffusion folder has unet/, "
                "vae/, text_encoder/, tokenizer/ and scheduler/, and for SDXL text_encoder_2/ and tokenizer_2/"
            )
        if part in PARTS and not [*wanted.parent.glob("*.safetensors"), *wanted.parent.glob("*.bin")]:
            raise ModelError(f"{name}: the part {part!r} has a config.json but no weights in {wanted.parent}")
        try:
            json.loads(wanted.read_text())
        except ValueError as error:
            raise ModelError(f"{name}: {wanted} is not readable JSON ({error})") from error
