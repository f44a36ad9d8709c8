"""Stable Diffusion's parts: loading them from a folder, a hub name, a single file or a bucket, and saving them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreamfleet.datasets.errors import ModelError
from dreamfleet.datasets.storage import Storage
from dreamfleet.trainers.sd import embeddings
from dreamfleet.trainers.sd.model_config import POCKET, ModelConfig, noise_schedule

ALL_PARTS = ("unet", "vae", "text_encoder")


def pocket_folder() -> Path:
    """Return the folder of the small base model that ships with dreamfleet."""
    return Path(__file__).parent / "pocket"


@dataclass
class StableDiffusion:
    """The loaded parts of one model (None: not loaded), and the few things every method does with them."""

    tokenizer: Any
    text_encoder: Any
    unet: Any
    vae: Any
    scheduler: Any
    folder: str
    content_hash: str
    clip_skip: int = 1
    max_token_length: int = 75
    encode_prompts: Callable[[Sequence[str]], Tensor] | None = None  # draws with these contexts [B, T, D]

    @property
    def prediction_type(self) -> str:
        """What the U-Net predicts: ``epsilon``, ``v_prediction`` or ``sample``."""
        return self.scheduler.config.prediction_type

    @property
    def num_chunks(self) -> int:
        """Chunks of 75 tokens in a prompt."""
        return self.max_token_length // 75

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self) -> int:
        """The side in pixels that the U-Net was trained at."""
        size = self.unet.config.sample_size
        return (size if isinstance(size, int) else size[0]) * self.vae_factor

    @property
    def context_width(self) -> int:
        """Width D of the text encoder's tokens."""
        return self.text_encoder.config.hidden_size

    def modules(self) -> dict[str, nn.Module]:
        """Return the loaded parts by name."""
        parts = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        return {name: part for name, part in parts.items() if part is not None}

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Turn prompts into ids ``[B, T]``, T = 77 a chunk, knowing the words of installed embeddings."""
        return embeddings.tokenize(self, prompts)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Encode ids ``[B, T]`` -> context ``[B, T, D]``, each chunk of 77 by itself, honouring ``clip_skip``."""
        batch, tokens = input_ids.shape
        input_ids = input_ids.reshape(-1, self.tokenizer.model_max_length)
        if self.clip_skip == 1:
            context = self.text_encoder(input_ids)[0]
        else:
            hidden = self.text_encoder(input_ids, output_hidden_states=True).hidden_states[-self.clip_skip]
            context = getattr(self.text_encoder, "text_model", self.text_encoder).final_layer_norm(hidden)
        return context.reshape(batch, tokens, -1)

    def encode_pictures(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pixels ``[B, 3, H, W]`` in [-1, 1] -> mean and std of the unscaled latents ``[B, C, h, w]``."""
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents ``[B, C, h, w]`` -> pixels ``[B, 3, H, W]`` in about [-1, 1]."""
        return self.vae.decode(
            latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False
        )[0].float()

    def freeze(self) -> None:
        """Put every part in eval mode with no gradients; a method then switches on what learns."""
        for part in self.modules().values():
            part.requires_grad_(False).eval()

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> StableDiffusion:
        """Move the parts, casting those without learning parameters to ``dtype`` (half precision saves memory)."""
        for part in self.modules().values():
            learns = any(parameter.requires_grad for parameter in part.parameters())
            part.to(device)
            if dtype is not None and not learns:
                part.to(dtype)
        return self


def load_model(config: ModelConfig, needs: Collection[str] = ALL_PARTS) -> StableDiffusion:
    """Load the parts in ``needs`` in float32, frozen.

    Raises ModelError naming the folder and the missing or broken part.
    """
    quiet_libraries()
    name = config.pretrained_model_name_or_path
    if not needs:
        return StableDiffusion(None, None, None, None, None, folder=name, content_hash="")
    if name == POCKET:
        return _load_folder(pocket_folder(), name, config, needs)
    if "://" in name:
        storage = Storage(name)
        with storage.local_copy("") as copy:
            return _load_path(Path(copy), name, config, needs)
    path = Path(name).expanduser()
    if path.exists():
        return _load_path(path, name, config, needs)
    return _load_path(_download(name, config), name, config, needs)


def quiet_libraries() -> None:
    """Keep diffusers' and transformers' bars and notices (one per loaded part) out of a run's own lines."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    if not torch.cuda.is_available():
        # Saving a model makes accelerate import DeepSpeed, which tells stdout that it found no GPU unless told so.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def save_pipeline(model: StableDiffusion, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a folder that ``StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)`` loads."""
    import copy

    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    embeddings.remove_embeddings(model)
    parts = {
        name: part if dtype in (None, part.dtype) else copy.deepcopy(part).to(dtype)
        for name, part in model.modules().items()
    }
    StableDiffusionPipeline(
        **parts,
        tokenizer=model.tokenizer,
        scheduler=sampling_scheduler(model),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def sampling_scheduler(model: StableDiffusion) -> Any:
    """Make a DDIM scheduler with the model's noise schedule."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler.from_config(model.scheduler.config)


def _load_path(path: Path, name: str, config: ModelConfig, needs: Collection[str]) -> StableDiffusion:
    if path.is_dir():
        return _load_folder(path, name, config, needs)
    if path.suffix in (".safetensors", ".ckpt"):
        return _load_single_file(path, name, config, needs)
    raise ModelError(f"{name}: not a model; expected a diffusers folder, a .safetensors or a .ckpt file")


def _load_folder(folder: Path, name: str, config: ModelConfig, needs: Collection[str]) -> StableDiffusion:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer

    classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    _require_parts(folder, name, [*needs, "tokenizer", "scheduler"])
    options = {"variant": config.variant} if config.variant else {}

    def load(part: str, cls: Any, root: Path, **extra: Any) -> Any:
        try:
            return cls.from_pretrained(root / part if part else root, local_files_only=True, **extra)
        except Exception as error:  # each library raises its own zoo of errors for a torn file or config
            raise ModelError(f"{name}: the part {part!r} cannot be loaded: {_first_line(error)}") from error

    parts = {part: load(part, classes[part], folder, torch_dtype=torch.float32, **options) for part in needs}
    if config.pretrained_vae_model_name_or_path and "vae" in needs:
        other = Path(config.pretrained_vae_model_name_or_path)
        if not other.is_dir():
            raise ModelError(f"model.pretrained_vae_model_name_or_path: no such folder: {other}")
        vae_folder = other / "vae" if (other / "vae").is_dir() else other
        parts["vae"] = load("", AutoencoderKL, vae_folder, torch_dtype=torch.float32)
    model = StableDiffusion(
        tokenizer=load("tokenizer", CLIPTokenizer, folder),
        scheduler=noise_schedule(load("scheduler", DDPMScheduler, folder), config, name),
        text_encoder=parts.get("text_encoder"),
        unet=parts.get("unet"),
        vae=parts.get("vae"),
        folder=name,
        content_hash=_fingerprint(folder),
        clip_skip=config.clip_skip,
        max_token_length=config.max_token_length,
    )
    model.freeze()
    return model


def _load_single_file(path: Path, name: str, config: ModelConfig, needs: Collection[str]) -> StableDiffusion:
    from dreamfleet.trainers.sd.formats.single_file import load_single_file

    model = load_single_file(path, name=name, needs=needs)
    model.content_hash, model.clip_skip = _fingerprint(path), config.clip_skip
    model.max_token_length = config.max_token_length
    model.scheduler = noise_schedule(model.scheduler, config, name)
    model.freeze()
    return model


def _require_parts(folder: Path, name: str, parts: Sequence[str]) -> None:
    files = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
    for part in parts:
        wanted = folder / part / files.get(part, "config.json")
        if not wanted.is_file():
            raise ModelError(
                f"{name}: the part {part!r} is missing ({wanted} not found); a Stable Diffusion folder has "
                f"unet/, vae/, text_encoder/, tokenizer/ and scheduler/"
            )
        if files.get(part) is None and not [
            *wanted.parent.glob("*.safetensors"),
            *wanted.parent.glob("*.bin"),
        ]:
            raise ModelError(f"{name}: the part {part!r} has a config.json but no weights in {wanted.parent}")
        try:
            json.loads(wanted.read_text())
        except ValueError as error:
            raise ModelError(f"{name}: {wanted} is not readable JSON ({error})") from error


def _download(name: str, config: ModelConfig) -> Path:
    looks_like_path = (
        name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith((".safetensors", ".ckpt"))
    )
    if looks_like_path:
        raise ModelError(
            f"model.pretrained_model_name_or_path: {name} does not exist; give 'pocket', a folder, a .safetensors or "
            f".ckpt file, or a hub name such as 'stable-diffusion-v1-5/stable-diffusion-v1-5'"
        )
    from huggingface_hub import snapshot_download

    patterns = [f"{part}/*" for part in (*ALL_PARTS, "tokenizer", "scheduler")] + ["model_index.json"]
    try:
        return Path(snapshot_download(name, revision=config.revision, allow_patterns=patterns))
    except Exception as error:  # network, auth and not-found errors differ from version to version
        raise ModelError(
            f"model.pretrained_model_name_or_path: {name!r} is no local folder and the hub did not give it "
            f"({_first_line(error)}); download it where there is a network, or set HF_TOKEN if it is gated"
        ) from error


def _fingerprint(path: Path) -> str:
    # Sampled, not whole: hashing the 4 GB of SD 1.5 would cost longer than loading it.
    digest = hashlib.sha256()
    names = ["unet", "vae", "text_encoder"]
    files = (
        [path] if path.is_file() else [f for n in names for f in sorted((path / n).glob("*")) if f.is_file()]
    )
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.parent.name if path.is_dir() else ''}/{file.name}:{size}".encode())
        with file.open("rb") as handle:
            for part in range(16):
                handle.seek(size * part // 16)
                digest.update(handle.read(65536))
    return digest.hexdigest()[:10]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
