"""The model family interface: all that differs between model families, and the registry that finds them.

Methods, batches, evaluation, memory planning and sampling work on a :class:`DiffusionModel` and know no family. A new
family is a folder beside `stable_diffusion/` with a subclass of :class:`DiffusionModel` and a :class:`ModelFamily` that
loads it, entered in :data:`FAMILIES`.

Shape suffixes: B batch, C latent channels, H W latent height and width, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamfleet.datasets.errors import ModelError
from dreamfleet.datasets.registry import Registry
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.distributed.device import copy_to_device
from dreamfleet.trainers.models import adapters, keyed_noise
from dreamfleet.trainers.models.condition import Condition
from dreamfleet.trainers.models.formats.lora import LoraFile, read_lora
from dreamfleet.trainers.models.pretrained import quiet_libraries
from dreamfleet.trainers.models.prompt_pieces import Piece

Component = Literal["denoiser", "vae", "text_encoder"]
#: The components of a model, as methods ask for them; a family may keep one in several parts.
COMPONENTS: tuple[Component, ...] = ("denoiser", "vae", "text_encoder")

# Pixels that a VAE encodes or decodes at once: more is no faster on a GPU, and at 512 px it would set a run's peak
# memory.
VAE_PIXELS = 8 * 256**2

PromptEncoder = Callable[[Sequence[str], Tensor], Condition]  # texts and their token ids -> condition


class DiffusionModel(ABC):
    """A loaded text-to-image model of one family. Parts that were not asked for are None."""

    #: key of the denoiser in :meth:`modules`, and the name of its parameter group
    denoiser_name: ClassVar[str]
    #: classes of the denoiser's repeated blocks: compiled one by one, each class compiles once
    block_classes: ClassVar[tuple[str, ...]] = ()
    #: parts that stay in float32 in every run, so that latents do not depend on a run's precision
    float32_parts: ClassVar[tuple[str, ...]] = ("vae",)
    #: whether the denoiser takes the image sizes of :class:`Condition`
    uses_time_ids: ClassVar[bool] = False

    folder: str  #: name or address that the model was loaded from
    content_hash: str  #: differs between models; compared between the ranks of a run
    encoder_hash: str = ""  #: of the VAE's encoder: cached latents are keyed by it
    clip_skip: int = 1
    max_token_length: int = 75
    vae: Any
    zeros_for_empty_prompt: bool = False  #: whether an empty negative prompt is encoded as zeros
    prompt_encoder: PromptEncoder | None = None  #: replaces :meth:`encode_tokens` when sampling
    loras: tuple[tuple[LoraFile, float | adapters.Strength], ...] = ()  #: applied ones; see `lora.set_loras`

    # Identity and parts

    @property
    @abstractmethod
    def title(self) -> str:
        """Name of the family for people, such as "Stable Diffusion 1"."""

    @property
    @abstractmethod
    def prediction_type(self) -> str:
        """What the denoiser predicts, such as ``epsilon``, ``v_prediction`` or ``velocity``."""

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """Return the loaded parts by name; the names are those of folders, parameters and LoRA files."""

    @property
    @abstractmethod
    def text_encoders(self) -> list[Any]:
        """The loaded text encoders. Embeddings are spliced into their token tables (see `embeddings`)."""

    @property
    @abstractmethod
    def tokenizers(self) -> list[Any]:
        """One tokenizer for each text encoder."""

    @property
    def unsupported(self) -> Mapping[str, str]:
        """Methods and export formats that this model does not support, each with the reason."""
        return {}

    @property
    def short_name(self) -> str:
        """Last component of the name."""
        return self.folder.rstrip("/").rpartition("/")[2]

    def short_hash(self) -> str | None:
        """Return the 10 hex digits by which the webui identifies the model, None if there are no weights."""
        return None

    def require_support(self, name: str) -> None:
        """Raise ModelError with the reason if ``name``, a method, is not supported."""
        if reason := self.unsupported.get(name):
            raise ModelError(f"{self.folder}: {reason}")

    @property
    def denoiser(self) -> Any:
        """The network that predicts from noised latents: a U-Net or a transformer."""
        return self.modules().get(self.denoiser_name)

    @property
    def denoiser_dtype(self) -> torch.dtype:
        """Precision that the denoiser computes in."""
        return next(p.dtype for p in self.denoiser.parameters() if p.is_floating_point())

    @property
    def text_device(self) -> torch.device:
        """Device of the text encoders, where token ids belong."""
        return next(self.text_encoders[0].parameters()).device

    def trainable_parts(self, *, text: bool) -> dict[str, nn.Module]:
        """Return the parts that gradients pass through, by name: the denoiser, with ``text`` the text encoders too."""
        encoders = {id(encoder) for encoder in self.text_encoders} if text else set()
        return {
            name: part
            for name, part in self.modules().items()
            if name == self.denoiser_name or id(part) in encoders
        }

    def unread_layers(self) -> list[nn.Module]:
        """Return layers of the text encoders that the loss does not depend on: their parameters get no gradient."""
        return []

    def freeze(self) -> None:
        """Put every part in eval mode without gradients; a method then turns on what it trains."""
        for part in self.modules().values():
            part.requires_grad_(False).eval()

    def to(
        self,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        *,
        home: torch.device | str | None = None,
        sharded: Collection[str] = (),
    ) -> Self:
        """Move the parts to ``device`` and cast those without trainable parameters to ``dtype``.

        In a part with LoRA adapters everything but the adapters is cast. Fully trainable parts and the ``sharded``
        ones go to ``home`` instead where it is given. ``float32_parts`` keep their precision.
        """
        for name, part in self.modules().items():
            trains, adapted = any(p.requires_grad for p in part.parameters()), adapters.has_adapters(part)
            waits = home is not None and (name in sharded or (trains and not adapted))
            if adapted and dtype is not None:
                adapters.cast_frozen(part, dtype)
            # In one call, so that no GPU has to hold frozen parts in float32.
            part.to(home if waits else device, None if trains or name in self.float32_parts else dtype)
        return self

    def checkpoint_activations(self, *, text: bool) -> None:
        """Recompute the denoiser's activations in the backward pass, with ``text`` the text encoders' as well."""
        self.denoiser.enable_gradient_checkpointing()
        # diffusers checkpoints in training mode alone, also a frozen denoiser that gradients pass through.
        self.denoiser.train()
        for encoder in self.text_encoders if text else ():
            # transformers 5.23 renamed the method, and 6 drops the old name.
            enable = getattr(encoder, "activation_checkpointing_enable", None)
            (enable or encoder.gradient_checkpointing_enable)()
            for module in encoder.modules():
                # transformers needs training mode too. Only of these modules: a frozen encoder's dropout stays off.
                module.training = module.training or getattr(module, "gradient_checkpointing", False)

    # Images and latents

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels C of a latent."""

    @property
    @abstractmethod
    def vae_factor(self) -> int:
        """Pixels per latent cell, along each side."""

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """Number that image width and height in pixels must be divisible by."""

    @property
    @abstractmethod
    def resolution(self) -> int:
        """Side in pixels that the model was trained at."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape ``(C, H, W)`` of the latents of an image of this size in pixels."""
        return self.latent_channels, height // self.vae_factor, width // self.vae_factor

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pixels ``[B, 3, height, width]`` in [-1, 1] -> mean and std of unscaled latents ``[B, C, H, W]``."""

    @abstractmethod
    def scale_latents(self, latents: Tensor) -> Tensor:
        """Bring unscaled latents to the scale (and shift) that the denoiser works in."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents ``[B, C, H, W]`` -> pixels ``[B, 3, height, width]`` in about [-1, 1]."""

    # Prompts

    @property
    def num_chunks(self) -> int:
        """Chunks of 75 tokens that a prompt is encoded in."""
        return self.max_token_length // 75

    @abstractmethod
    def tokenize(self, prompts: Sequence[str], swap: Mapping[str, str] | None = None) -> Tensor:
        """Return token ids ``[B, ..., T]`` of literal prompts; ``swap`` replaces learned words by others."""

    @abstractmethod
    def tokenize_weighted(
        self, texts: Sequence[Sequence[Piece]], *, least: int = 1
    ) -> tuple[Tensor, list[list[float]]]:
        """Return token ids ``[B, ..., T]`` of parsed texts and the weight of each token ``[B][T]``.

        All rows have the chunks of the longest text, ``least`` or more.
        """

    @abstractmethod
    def encode_tokens(self, input_ids: Tensor) -> Condition:
        """Encode token ids as :meth:`tokenize` returns them; ``time_ids`` are left out."""

    def weigh_tokens(self, condition: Condition, weights: Tensor, shares: Tensor) -> Condition:
        """Apply attention weights ``[B, T]`` to encoded texts; a mean counts each text ``shares`` ``[B]`` times."""
        raise ModelError(f"{self.title} does not support attention weights in prompts; remove them")

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Tokenize and encode literal prompts on the device of the text encoders."""
        return self.encode_tokens(copy_to_device(self.tokenize(prompts), self.text_device))

    @abstractmethod
    def empty_condition(self, num: int) -> Condition:
        """Return an uninitialised condition of ``num`` samples in its shapes and dtypes, for memory planning."""

    def condition_of(self, batch: Mapping[str, Any]) -> Condition:
        """Return the condition of a batch; encodes its ``input_ids`` where the text side trains."""
        if "context" in batch:
            return Condition.in_batch(batch)
        condition = self.encode_tokens(batch["input_ids"])
        return condition.with_sizes(batch["time_ids"]) if self.uses_time_ids else condition

    # Diffusion: noising, prediction, target and loss

    @abstractmethod
    def draw_timestep(self, rng: np.random.Generator) -> float:
        """Draw the timestep of one training sample."""

    @abstractmethod
    def even_timesteps(self, count: int) -> Tensor:
        """Return ``count`` timesteps ``[count]`` spread evenly over the whole range, for held-out losses."""

    @abstractmethod
    def noise_level(self, timesteps: Tensor) -> Tensor:
        """Return how far along the noise process timesteps ``[B]`` are: 0 for the least noise, 1 for the most."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the latents ``[B, C, H, W]`` noised to their timesteps ``[B]``."""

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Run the denoiser on noised latents ``[B, C, H, W]`` -> its prediction, in the precision it computes in."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the denoiser is trained to predict, ``[B, C, H, W]``."""

    @abstractmethod
    def clean_estimate(self, predicted: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Return the clean latents ``[B, C, H, W]`` that a prediction implies, in float32."""

    def loss_weights(self, timesteps: Tensor, snr_gamma: float) -> Tensor:
        """Return the min-SNR weight of each sample ``[B]``."""
        raise ModelError(f"{self.title} does not support train.snr_gamma; remove it")

    @abstractmethod
    def make_sampler(self, name: str) -> Any:
        """Return the sampler ``name`` (``ddim``, ``euler_a``, ``dpm++``) with the scheduler interface of diffusers.

        That is ``set_timesteps``, ``timesteps``, ``init_noise_sigma``, ``scale_model_input`` and ``step``.
        """

    @property
    def ends_in_noise(self) -> bool:
        """Whether nothing of the image is left at the last timestep (zero terminal SNR)."""
        return False

    def draw_noise(
        self, keys: Sequence[keyed_noise.SampleKey], shape: tuple[int, ...], *, noise_offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Draw each sample's noise ``[B, *shape]`` and timestep ``[B]`` from its own key."""
        return keyed_noise.draw_noise(
            keys, shape, draw_timestep=self.draw_timestep, noise_offset=noise_offset
        )

    def loss(self, predicted: Tensor, batch: Mapping[str, Any], *, snr_gamma: float | None = None) -> Tensor:
        """Return the loss per sample ``[B]`` of a prediction: mean squared error, weighted by the batch's ``mask``.

        ``batch``: ``latents`` and ``noise`` ``[B, C, H, W]``, ``timesteps`` ``[B]``, ``mask`` ``[B, 1, H, W]``.
        """
        timesteps = batch["timesteps"]
        target_BCHW = self.target(batch["latents"], batch["noise"], timesteps)
        error_BCHW = F.mse_loss(predicted.float(), target_BCHW.float(), reduction="none")
        if batch.get("mask") is not None:
            error_BCHW = error_BCHW * batch["mask"]
        per_sample = error_BCHW.flatten(1).mean(1)
        return per_sample if snr_gamma is None else per_sample * self.loss_weights(timesteps, snr_gamma)

    def denoising_loss(self, batch: Mapping[str, Any], *, snr_gamma: float | None = None) -> Tensor:
        """Noise a batch's latents, predict, and return the loss per sample ``[B]``."""
        noisy = self.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
        predicted = self.predict(noisy, batch["timesteps"], self.condition_of(batch))
        return self.loss(predicted, batch, snr_gamma=snr_gamma)

    # Files

    @abstractmethod
    def save_folder(self, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the model as the folder that its diffusers pipeline loads."""

    def save_file(
        self, path: Path, *, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
    ) -> Path:
        """Write the whole model as one ``.safetensors`` or ``.ckpt`` file."""
        raise ModelError(f"{self.title} has no single-file layout here; export the diffusers folder")

    def lora_layers(
        self, targets: Any, *, parts: Sequence[str], unread: Sequence[nn.Module] = ()
    ) -> dict[str, list[str]]:
        """Return the layers of each part that get LoRA matrices, by name; ``targets``: `method.lora_target_modules`.

        ``unread`` modules, which the loss does not depend on, get none.
        """
        raise ModelError(f"{self.title} does not support LoRA training; remove method.lora_rank")

    def read_lora(self, path: Path) -> LoraFile:
        """Read a LoRA file. Raises FormatError for another kind of file."""
        return read_lora(path)

    def write_kohya_lora(self, file: LoraFile, path: Path, *, dtype: torch.dtype) -> Path:
        """Write a LoRA in kohya's key layout."""
        raise ModelError(f"{self.title} has no kohya layout for LoRA here; export diffusers_lora")


class ModelFamily(Protocol):
    """Loads the models of one family."""

    def recognises(self, config: ModelConfig) -> bool:
        """Return whether the model that the section names is of this family; reads configs at most."""
        ...

    def load(self, config: ModelConfig, needs: Collection[str]) -> DiffusionModel:
        """Load the components in ``needs`` in float32, frozen. Raises ModelError for missing or broken parts."""
        ...

    def load_shape(self, config: ModelConfig, needs: Collection[str]) -> DiffusionModel:
        """Build the components in ``needs`` on torch's meta device, from configs or headers, without weights."""
        ...


DEFAULT_FAMILY = "stable_diffusion"
FAMILIES: Registry[ModelFamily] = Registry(
    "model family",
    group="dreamfleet.families",
    builtin={DEFAULT_FAMILY: "dreamfleet.trainers.models.stable_diffusion.loading:FAMILY"},
)


def family_of(config: ModelConfig) -> ModelFamily:
    """Return the family of the model that a section names; Stable Diffusion unless another one recognises it."""
    others = (family for name, family in FAMILIES.items() if name != DEFAULT_FAMILY)
    return next((family for family in others if family.recognises(config)), FAMILIES.get(DEFAULT_FAMILY))


def load_model(config: ModelConfig, needs: Collection[str] = COMPONENTS) -> DiffusionModel:
    """Load the components in ``needs`` of a model in float32, frozen. Raises ModelError for missing or broken parts."""
    quiet_libraries()
    return family_of(config).load(config, needs)


def load_shape(config: ModelConfig, needs: Collection[str] = COMPONENTS) -> DiffusionModel:
    """Build the components in ``needs`` without weights, on torch's meta device; nothing is downloaded."""
    return family_of(config).load_shape(config, needs)
