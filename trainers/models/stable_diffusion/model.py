"""Stable Diffusion's parts: loading them from a folder, a hub name, a single file or a bucket, and saving them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreamfleet.datasets.errors import ModelError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.model import POCKET, ModelConfig
from dreamfleet.trainers.distributed.device import copy_to_device
from dreamfleet.trainers.models import lora
from dreamfleet.trainers.models.condition import Condition
from dreamfleet.trainers.models.formats.ldm_names import Family, family_of
from dreamfleet.trainers.models.pretrained import pocket_folder, quiet_libraries
from dreamfleet.trainers.models.stable_diffusion import prompt_tokens
from dreamfleet.trainers.models.stable_diffusion.loading import (
    SINGLE_FILES,
    download,
    fingerprint,
    load_folder_parts,
    short_hash,
    vae_fingerprint,
)
from dreamfleet.trainers.models.stable_diffusion.noise_schedule import noise_schedule

# More at once is no faster on a GPU, and at 512 px it would set a run's peak memory.
VAE_PIXELS = 8 * 256**2
ALL_PARTS = ("unet", "vae", "text_encoder")  # the text encoder of SDXL is two


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
    encoder_hash: str = ""  # of the VAE's encoder, whole and in float32: what latents depend on
    clip_skip: int = 1
    max_token_length: int = 75
    encode_prompts: Callable[[Sequence[str], Tensor], Condition] | None = (
        None  # of texts and ids, to draw with
    )
    text_encoder_2: Any = None  # SDXL
    tokenizer_2: Any = None
    zeros_for_empty_prompt: bool = False  # the empty negative prompt is zeros (SDXL base)
    loras: tuple[tuple[Any, float | lora.Strength], ...] = ()  # it draws with: see `lora.set_loras`
    short_hash: Callable[[], str | None] = lambda: (
        None
    )  # by which the webui tells models: see `model_files.short_hash`

    @property
    def short_name(self) -> str:
        """The last part of its name, without the suffix of a model file, as the webui calls it."""
        name = self.folder.rstrip("/").rpartition("/")[2]
        return Path(name).stem if name.lower().endswith(SINGLE_FILES) else name

    @property
    def is_sdxl(self) -> bool:
        """Whether the U-Net is also told a summary of the prompt and the picture's sizes."""
        return self.tokenizer_2 is not None

    @property
    def family(self) -> Family:
        """Stable Diffusion 1.x, 2.x or XL, told by the text encoders, which must be loaded."""
        names = ("text_encoder", "text_encoder_2")
        return family_of({n: e.config.to_dict() for n, e in zip(names, self.text_encoders, strict=False)})

    @property
    def text_encoders(self) -> list[Any]:
        """The text encoder, or SDXL's two."""
        return [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]

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
        """Width D of a prompt's tokens: the text encoder's, the sum of SDXL's two."""
        return sum(encoder.config.hidden_size for encoder in self.text_encoders)

    def modules(self) -> dict[str, nn.Module]:
        """Return the loaded parts by name."""
        names = ("unet", "vae", "text_encoder", "text_encoder_2")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    def tokenize(self, prompts: Sequence[str], swap: Mapping[str, str] | None = None) -> Tensor:
        """Turn literal prompts into ids ``[B, T]``, T = 77 a chunk, knowing the words of installed embeddings.

        ``[B, 2, T]`` for SDXL, whose two tokenizers pad differently. ``swap``: words to read as others.
        """
        return prompt_tokens.tokenize(self, prompts, swap)

    def read(self, prompts: Sequence[str]) -> Condition:
        """Tokenise and encode prompts, where the text encoder is."""
        device = next(self.text_encoder.parameters()).device
        return self.condition(copy_to_device(self.tokenize(prompts), device))

    def condition(self, input_ids: Tensor) -> Condition:
        """Encode ids as :meth:`tokenize` gives them; SDXL's sizes are left open (:meth:`Condition.sized`)."""
        if not self.is_sdxl:
            return Condition(self.encode_text(input_ids))
        ids_BT, ids_2_BT = input_ids.unbind(1)
        context_2, pooled = self._encode_second(ids_2_BT)
        return Condition(torch.cat([self._encode_first(ids_BT), context_2], dim=-1), pooled)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Encode ids of SD 1.x or 2.x ``[B, T]`` -> context ``[B, T, D]``, each chunk of 77 by itself.

        ``clip_skip`` layers from the end. SD 2's encoder comes with the layers that it is to have, so 1 is right there.
        """
        batch, tokens = input_ids.shape
        input_ids = input_ids.reshape(-1, self.tokenizer.model_max_length)
        if self.clip_skip == 1:
            context = self.text_encoder(input_ids)[0]
        else:
            hidden = self.text_encoder(input_ids, output_hidden_states=True).hidden_states[-self.clip_skip]
            context = getattr(self.text_encoder, "text_model", self.text_encoder).final_layer_norm(hidden)
        return context.reshape(batch, tokens, -1)

    def _encode_first(self, ids_BT: Tensor) -> Tensor:
        """Encode for SDXL by its first encoder: the layer before the last, without the final norm."""
        chunks = ids_BT.reshape(-1, self.tokenizer.model_max_length)
        hidden = self.text_encoder(chunks, output_hidden_states=True).hidden_states
        return hidden[-1 - self.clip_skip].reshape(*ids_BT.shape, -1)

    def _encode_second(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Encode for SDXL by its second encoder -> tokens ``[B, T, D]``, and the first chunk's summary ``[B, P]``."""
        chunks = ids_BT.reshape(-1, self.tokenizer_2.model_max_length)
        encoder = self.text_encoder_2
        found = encoder.text_model(chunks, output_hidden_states=True)
        # Not its own pooled output: with SDXL's config that takes the highest id for the end, so a learned word.
        each = len(chunks) // len(ids_BT)
        first, last = chunks[::each], found.last_hidden_state[::each]
        ends = (first == self.tokenizer_2.eos_token_id).int().argmax(dim=-1)
        pooled = encoder.text_projection(last[torch.arange(len(last), device=last.device), ends])
        return found.hidden_states[-1 - self.clip_skip].reshape(*ids_BT.shape, -1), pooled

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pixels ``[B, 3, H, W]`` in [-1, 1] -> mean and std of the unscaled latents ``[B, C, h, w]``."""
        with self._exact():
            posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents ``[B, C, h, w]`` -> pixels ``[B, 3, H, W]`` in about [-1, 1]."""
        at_once = max(1, VAE_PIXELS // (latents[0, 0].numel() * self.vae_factor**2))
        with self._exact():
            scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
            parts = [self.vae.decode(part, return_dict=False)[0] for part in scaled.split(at_once)]
            return torch.cat(parts).float()

    def freeze(self) -> None:
        """Put every part in eval mode with no gradients; a method then switches on what learns."""
        for part in self.modules().values():
            part.requires_grad_(False).eval()

    def to(
        self,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        *,
        home: Any = None,
        sharded: Collection[str] = (),
    ) -> StableDiffusion:
        """Move the parts, casting those without learning parameters to ``dtype`` (half precision saves memory).

        Of a part in which LoRA's matrices learn, all but these. One that learns whole goes to ``home`` where given, and
        so do the ``sharded``. The VAE keeps its precision: latents must not depend on what a run computes in.
        """
        for name, part in self.modules().items():
            learns, adapted = any(p.requires_grad for p in part.parameters()), lora.has_adapters(part)
            waits = home is not None and (name in sharded or (learns and not adapted))
            wide = name == "vae"
            if adapted and dtype is not None:
                lora.cast_frozen(part, dtype)
            # In one go, so that no card has to hold what is frozen in float32.
            part.to(home if waits else device, None if learns or wide else dtype)
        return self

    def _exact(self) -> AbstractContextManager[Any]:
        """Return the context that the VAE runs in: no autocast around it narrows what it computes."""
        return torch.autocast(self.vae.device.type, enabled=False)


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
        with Storage(name).local_copy() as local:
            model = _load_path(local, name, config, needs)
            digest = model.short_hash()  # now, while the file is here
            model.short_hash = lambda: digest
            return model
    path = Path(name).expanduser()
    if path.exists():
        return _load_path(path, name, config, needs)
    return _load_path(download(name, config), name, config, needs)


def _load_path(path: Path, name: str, config: ModelConfig, needs: Collection[str]) -> StableDiffusion:
    if path.is_dir():
        return _load_folder(path, name, config, needs)
    if path.suffix in SINGLE_FILES:
        return _load_single_file(path, name, config, needs)
    raise ModelError(f"{name}: not a model; expected a diffusers folder, a .safetensors or a .ckpt file")


def _load_folder(folder: Path, name: str, config: ModelConfig, needs: Collection[str]) -> StableDiffusion:
    parts: dict[str, Any] = dict.fromkeys(ALL_PARTS) | load_folder_parts(folder, name, config, needs)
    model = StableDiffusion(**parts, folder=name, content_hash="")
    return _as_configured(model, folder, config)


def _load_single_file(path: Path, name: str, config: ModelConfig, needs: Collection[str]) -> StableDiffusion:
    from dreamfleet.trainers.models.stable_diffusion.single_file import load_single_file

    return _as_configured(load_single_file(path, name=name, needs=needs), path, config)


def _as_configured(model: StableDiffusion, path: Path, config: ModelConfig) -> StableDiffusion:
    """Make a loaded model what the recipe's section says, frozen."""
    model.content_hash, model.encoder_hash = fingerprint(path), vae_fingerprint(model.vae)
    model.short_hash = partial(short_hash, path)
    model.clip_skip = config.clip_skip
    model.max_token_length = config.max_token_length
    model.scheduler = noise_schedule(model.scheduler, config, model.folder)
    model.freeze()
    return model
