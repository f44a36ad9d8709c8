"""Finds Stable Diffusion's parts on disk or on the hub, and loads them from a diffusers folder."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.models.pretrained import first_line
from dreamfleet.trainers.models.stable_diffusion.family import Configs, is_sdxl, refuse_other_families

SINGLE_FILES = (".safetensors", ".ckpt")  # the endings of whole models in one file
WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")  # the last in SDXL only
_CONFIGS = {
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}


def load_folder_parts(folder: Path, name: str, config: ModelConfig, needs: Collection[str]) -> dict[str, Any]:
    """Load the parts in ``needs`` of a diffusers folder in float32, its tokenizers and its noise schedule.

    In SDXL a need for the text encoder is one for both. Raises ModelError naming the missing or broken part, or a
    family that no method trains.
    """
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
    configs = _read_configs(folder)
    refuse_other_families(configs, name)
    wanted = [*needs, "tokenizer", "scheduler"]
    if is_sdxl(configs):
        wanted += ["tokenizer_2", *(["text_encoder_2"] if "text_encoder" in needs else [])]
    _require_parts(folder, name, wanted)

    def load(part: str, root: Path, **options: Any) -> Any:
        try:
            return classes[part].from_pretrained(root, local_files_only=True, **options)
        except Exception as error:  # each library raises its own zoo of errors for a torn file or config
            raise ModelError(f"{name}: the part {part!r} cannot be loaded: {first_line(error)}") from error

    whole: dict[str, Any] = {"torch_dtype": torch.float32}
    variant = {"variant": config.variant} if config.variant else {}
    parts = {}
    for part in wanted:
        options = {**whole, **variant} if part in WEIGHTS else {}
        parts[part] = load(part, folder / part, **options)
    if config.pretrained_vae_model_name_or_path and "vae" in needs:
        other = Path(config.pretrained_vae_model_name_or_path)
        if not other.is_dir():
            raise ModelError(f"model.pretrained_vae_model_name_or_path: no such folder: {other}")
        parts["vae"] = load("vae", other / "vae" if (other / "vae").is_dir() else other, **whole)
    if is_sdxl(configs):
        index = _read_json(folder / "model_index.json")
        parts["zeros_for_empty_prompt"] = bool(index.get("force_zeros_for_empty_prompt", True))
    return parts


def download(name: str, config: ModelConfig) -> Path:
    """Fetch the parts of a hub's model -> its folder in the cache. Raises ModelError for what is no hub name."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith(SINGLE_FILES)
    if looks_like_path:
        raise ModelError(
            f"the model {name} (--model, or model.pretrained_model_name_or_path in a recipe) does not exist; give "
            f"'pocket', a folder, a .safetensors or .ckpt file, or a hub name such as "
            f"'stable-diffusion-v1-5/stable-diffusion-v1-5'"
        )
    from huggingface_hub import snapshot_download

    patterns = [f"{part}/*" for part in (*WEIGHTS, *_CONFIGS)] + ["model_index.json"]
    try:
        return Path(snapshot_download(name, revision=config.revision, allow_patterns=patterns))
    except Exception as error:  # network, auth and not-found errors differ from version to version
        raise ModelError(
            f"the model {name!r} (--model, or model.pretrained_model_name_or_path in a recipe) is no local folder and "
            f"the hub did not give it ({first_line(error)}); download it where there is a network, or set HF_TOKEN "
            "if it is gated"
        ) from error


def fingerprint(path: Path) -> str:
    """Return 10 hex digits that differ between models: a hash of samples of a file, or of a folder's parts."""
    # Sampled, not whole: hashing the 4 GB of SD 1.5 would cost longer than loading it.
    digest = hashlib.sha256()
    files = (
        [path]
        if path.is_file()
        else [f for n in WEIGHTS for f in sorted((path / n).glob("*")) if f.is_file()]
    )
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.parent.name if path.is_dir() else ''}/{file.name}:{size}".encode())
        with file.open("rb") as handle:
            for part in range(16):
                handle.seek(size * part // 16)
                digest.update(handle.read(65536))
    return digest.hexdigest()[:10]


def short_hash(path: Path) -> str | None:
    """Return the first 10 hex digits of a model file's sha256, by which the webui tells models apart.

    Of a diffusers folder those of its U-Net's weights (of all its files in order); None where there is nothing to read.
    """
    if path.is_file():
        files = [path]
    else:
        weights = path / "unet"
        files = sorted(weights.glob("*.safetensors")) or sorted(weights.glob("*.bin"))
    try:
        stamps = tuple((str(file), (s := file.stat()).st_size, s.st_mtime_ns) for file in files)
        return _sha256(stamps)[:10] if stamps else None
    except OSError:
        return None


@functools.lru_cache(maxsize=8)
def _sha256(stamps: tuple[tuple[str, int, int], ...]) -> str:
    # Some seconds for the gigabytes of a model, so once a process; a file that changed has another stamp.
    digest = hashlib.sha256()
    for file, _, _ in stamps:
        with open(file, "rb") as handle:
            while block := handle.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def vae_fingerprint(vae: Any) -> str:
    """Return 16 hex digits over what latents depend on: the weights of a VAE's encoder, two settings; "" without one.

    Decoders may differ: those of VAEs that were trained on for better faces do.
    """
    if vae is None:
        return ""
    digest = hashlib.sha256(f"{vae.config.act_fn} {vae.config.norm_num_groups}".encode())
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.float().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def _read_configs(folder: Path) -> Configs:
    # Torn ones count as there: _require_parts tells about them.
    files = {part: folder / part / "config.json" for part in WEIGHTS}
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
                "vae/, text_encoder/, tokenizer/ and scheduler/, and SDXL's text_encoder_2/ and tokenizer_2/ too"
            )
        if part in WEIGHTS and not [*wanted.parent.glob("*.safetensors"), *wanted.parent.glob("*.bin")]:
            raise ModelError(f"{name}: the part {part!r} has a config.json but no weights in {wanted.parent}")
        try:
            json.loads(wanted.read_text())
        except ValueError as error:
            raise ModelError(f"{name}: {wanted} is not readable JSON ({error})") from error
