"""The Stable Diffusion 1.x and 2.x model: parts, text and image encoding, diffusion, and files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.models.condition import Condition
from dreamfleet.trainers.models.embeddings import remove_embeddings
from dreamfleet.trainers.models.family import VAE_PIXELS, DiffusionModel, PromptEncoder
from dreamfleet.trainers.models.formats.ldm_names import Family, family_of, parts_of
from dreamfleet.trainers.models.formats.lora import LoraFile, read_lora, write_kohya_lora
from dreamfleet.trainers.models.formats.lora_names import STANDARD_LAYERS
from dreamfleet.trainers.models.formats.model_header import config_of, model_header
from dreamfleet.trainers.models.formats.single_file import write_single_file
from dreamfleet.trainers.models.learned_words import words_of
from dreamfleet.trainers.models.prompt_pieces import Piece
from dreamfleet.trainers.models.stable_diffusion import prompt_tokens, unet_blocks
from dreamfleet.trainers.models.stable_diffusion.lora_targets import Targets, choose_layers
from dreamfleet.trainers.models.stable_diffusion.noise import clean_estimate, make_target, signal_to_noise
from dreamfleet.trainers.models.stable_diffusion.pipeline_folder import save_pipeline
from dreamfleet.trainers.models.stable_diffusion.samplers import make_sampler
from dreamfleet.trainers.models.stable_diffusion.variants import TITLES, UNSUPPORTED

SINGLE_FILES = (".safetensors", ".ckpt")  # suffixes of single files that contain a whole model
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")  # the last in SDXL only


@dataclass
class StableDiffusion(DiffusionModel):
    """Stable Diffusion 1.x or 2.x, which differ only in their configs; parts that are not loaded are None."""

    denoiser_name: ClassVar[str] = "unet"
    block_classes: ClassVar[tuple[str, ...]] = ("BasicTransformerBlock", "ResnetBlock2D")

    tokenizer: Any
    text_encoder: Any
    unet: Any
    vae: Any
    scheduler: Any
    folder: str
    content_hash: str
    encoder_hash: str = ""
    clip_skip: int = 1
    max_token_length: int = 75
    prompt_encoder: PromptEncoder | None = None
    zeros_for_empty_prompt: bool = False
    loras: tuple[Any, ...] = ()
    hash_file: Callable[[], str | None] = lambda: None  # computes short_hash() from the model's files

    # Identity and parts

    @property
    def family(self) -> Family:
        """``sd1``, ``sd2`` or ``sdxl``, derived from the text encoders, which must be loaded."""
        names = ("text_encoder", "text_encoder_2")
        return family_of({n: e.config.to_dict() for n, e in zip(names, self.text_encoders, strict=False)})

    @property
    def title(self) -> str:
        return TITLES[self.family]

    @property
    def prediction_type(self) -> str:
        """What the U-Net predicts: ``epsilon``, ``v_prediction`` or ``sample``."""
        return self.scheduler.config.prediction_type

    @property
    def unsupported(self) -> Mapping[str, str]:
        return UNSUPPORTED[self.family]

    @property
    def short_name(self) -> str:
        """The webui's name of the model: the last component of :attr:`folder` without the suffix of a model file."""
        name = super().short_name
        return Path(name).stem if name.lower().endswith(SINGLE_FILES) else name

    def short_hash(self) -> str | None:
        return self.hash_file()

    def modules(self) -> dict[str, nn.Module]:
        return {name: part for name in PARTS if (part := getattr(self, name, None)) is not None}

    @property
    def denoiser(self) -> Any:
        return self.unet

    @property
    def denoiser_dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def text_encoders(self) -> list[Any]:
        return [] if self.text_encoder is None else [self.text_encoder]

    @property
    def tokenizers(self) -> list[Any]:
        return [self.tokenizer]

    def unread_layers(self) -> list[nn.Module]:
        return self._skipped_layers(self.clip_skip - 1)

    def _skipped_layers(self, count: int) -> list[nn.Module]:
        layers = list(self._text_body.encoder.layers)
        return layers[len(layers) - count :]

    @property
    def _text_body(self) -> Any:
        return getattr(
            self.text_encoder, "text_model", self.text_encoder
        )  # transformers 5 dropped this level

    # Images and latents

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def vae_factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size_multiple(self) -> int:
        # The U-Net halves height and width at every level but the last.
        return self.vae_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def resolution(self) -> int:
        size = self.unet.config.sample_size
        return (size if isinstance(size, int) else size[0]) * self.vae_factor

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        with self._without_autocast():
            posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def scale_latents(self, latents: Tensor) -> Tensor:
        return latents * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        at_once = max(1, VAE_PIXELS // (latents[0, 0].numel() * self.vae_factor**2))
        with self._without_autocast():
            scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
            parts = [self.vae.decode(part, return_dict=False)[0] for part in scaled.split(at_once)]
            return torch.cat(parts).float()

    def _without_autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.vae.device.type, enabled=False)

    # Prompts

    def tokenize(self, prompts: Sequence[str], swap: Mapping[str, str] | None = None) -> Tensor:
        """Return the token ids ``[B, T]`` of prompts without prompt syntax, with T = 77 per chunk.

        The vectors of learned words have ids above the tokenizer's. ``swap`` is as in :class:`DiffusionModel`.
        """
        return prompt_tokens.tokenize(words_of(self, swap), prompts, self.num_chunks)

    def tokenize_weighted(
        self, texts: Sequence[Sequence[Piece]], *, least: int = 1
    ) -> tuple[Tensor, list[list[float]]]:
        return prompt_tokens.tokenize_weighted(words_of(self), texts, least)

    def encode_tokens(self, input_ids: Tensor) -> Condition:
        return Condition(self.encode_text(input_ids))

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Encode token ids ``[B, T]`` -> context ``[B, T, D]``, each chunk of 77 tokens separately.

        The output is that of layer ``clip_skip``, counted from the end. SD 2's text encoder is published without its
        last layer, so 1 is right for it too.
        """
        batch, tokens = input_ids.shape
        input_ids = input_ids.reshape(-1, self.tokenizer.model_max_length)
        if self.clip_skip == 1:
            context = self.text_encoder(input_ids)[0]
        else:
            hidden = self.text_encoder(input_ids, output_hidden_states=True).hidden_states[-self.clip_skip]
            context = self._text_body.final_layer_norm(hidden)
        return context.reshape(batch, tokens, -1)

    def weigh_tokens(self, condition: Condition, weights: Tensor, shares: Tensor) -> Condition:
        """Apply attention weights ``[B, T]``; the mean of each text encoder's output is restored separately."""
        widths = [encoder.config.hidden_size for encoder in self.text_encoders]
        chunk = self.tokenizer.model_max_length
        sides = [
            prompt_tokens.emphasise(side, weights, shares, chunk=chunk)
            for side in condition.context.split(widths, dim=-1)
        ]
        return condition._replace(context=torch.cat(sides, dim=-1))

    @property
    def context_width(self) -> int:
        """Width D of an encoded token: the sum of the text encoders' widths."""
        return sum(encoder.config.hidden_size for encoder in self.text_encoders)

    def empty_condition(self, num: int) -> Condition:
        tokens = self.tokenizer.model_max_length * self.num_chunks
        return Condition(torch.empty(num, tokens, self.context_width, dtype=self.text_encoder.dtype))

    # Diffusion

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps of the noise schedule, usually 1000."""
        return self.scheduler.config.num_train_timesteps

    def draw_timestep(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.num_timesteps))

    def even_timesteps(self, count: int) -> Tensor:
        return torch.tensor([int((j + 0.5) * self.num_timesteps / count) for j in range(count)])

    def noise_level(self, timesteps: Tensor) -> Tensor:
        return timesteps.float() / max(1, self.num_timesteps - 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.scheduler.add_noise(latents, noise, timesteps)

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        return self.unet(noisy, timesteps, condition.context, return_dict=False)[0]

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return make_target(self.scheduler, latents, noise, timesteps)

    def clean_estimate(self, predicted: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return clean_estimate(self.scheduler, predicted, noisy, timesteps)

    def signal_to_noise(self, timesteps: Tensor, *, needed_by: str) -> Tensor:
        return signal_to_noise(self.scheduler, timesteps)

    def make_sampler(self, name: str) -> Any:
        return make_sampler(name, self.scheduler.config)

    @property
    def ends_in_noise(self) -> bool:
        return bool(self.scheduler.config.get("rescale_betas_zero_snr", False))

    # Files

    def save_folder(self, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a folder that ``StableDiffusionPipeline`` loads. Removes the learned words from the text encoders."""
        remove_embeddings(self)
        save_pipeline(
            self.modules(),
            folder,
            tokenizers=self._named_tokenizers(),
            scheduler=self.scheduler,
            zeros_for_empty_prompt=self.zeros_for_empty_prompt,
            dtype=dtype,
        )

    def save_file(
        self, path: Path, *, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
    ) -> Path:
        """Write the whole model in the webui's key layout; see `formats.single_file.write_single_file`.

        ``metadata`` is added to the header of a `.safetensors` file. Raises ModelError if a part is not loaded.
        """
        parts = self.modules()
        configs = {part: config_of(module) for part, module in parts.items()}
        if missing := [part for part in parts_of(family_of(configs)) if part not in parts]:
            raise ModelError(f"{path}: a single file needs the whole model; {', '.join(missing)} not loaded.")
        header = model_header(
            configs,
            scheduler=self.scheduler.config,
            tokenizers=self._named_tokenizers(),
            resolution=self.resolution,
            title=path.stem,
        )
        return write_single_file(
            {part: module.state_dict() for part, module in parts.items()},
            path,
            configs=configs,
            scheduler=self.scheduler.config,
            header={**header, **(metadata or {})},
            dtype=dtype,
        )

    def _named_tokenizers(self) -> dict[str, Any]:
        return dict(zip(("tokenizer", "tokenizer_2"), self.tokenizers, strict=False))

    def lora_layers(
        self, targets: Targets, *, parts: Sequence[str], unread: Sequence[nn.Module] = ()
    ) -> dict[str, list[str]]:
        modules = self.modules()
        return choose_layers(
            {part: modules[part] for part in parts}, targets, unread=unread, name=self.folder
        )

    def count_blocks(self) -> dict[str, int]:
        return unet_blocks.count_blocks(self.unet.config, is_sdxl=self.family == "sdxl")

    def block_of(self, layer: str) -> tuple[str, int]:
        return unet_blocks.block_of(layer, self.unet.config, is_sdxl=self.family == "sdxl")

    def read_lora(self, path: Path) -> LoraFile:
        # The number of layers per block is needed to read files with Stability's block names.
        layers = self.unet.config.layers_per_block
        return read_lora(path, layers_per_block=layers if isinstance(layers, int) else STANDARD_LAYERS)

    def write_kohya_lora(self, file: LoraFile, path: Path, *, dtype: torch.dtype) -> Path:
        config = dict(self.unet.config)
        return write_kohya_lora(file, path, dtype=dtype, family=self.family, unet_config=config)
