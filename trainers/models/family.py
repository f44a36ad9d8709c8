"""The interface between model families (Stable Diffusion, ...) and the rest of the trainer, and the family registry.

Methods, batches, evaluation, memory planning and sampling use only :class:`DiffusionModel` and contain no code for a
particular family. To add a family, write a package beside `stable_diffusion/` with a subclass of
:class:`DiffusionModel` and a :class:`ModelFamily` that loads it, and register it in :data:`FAMILIES`.

Shape suffixes: B batch, C latent channels, H W latent height and width, T tokens.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from dreamfleet.datasets.errors import ModelError
from dreamfleet.datasets.registry import Registry
from dreamfleet.trainers.config.loss import LossConfig
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.config.noise import NoiseConfig
from dreamfleet.trainers.distributed.device import copy_to_device
from dreamfleet.trainers.models import adapters, keyed_noise
from dreamfleet.trainers.models.condition import Condition
from dreamfleet.trainers.models.denoising_loss import PLAIN, denoising_losses
from dreamfleet.trainers.models.formats.lora import LoraFile, read_lora
from dreamfleet.trainers.models.pretrained import quiet_libraries
from dreamfleet.trainers.models.prompt_pieces import Piece
from dreamfleet.trainers.models.shared_weights import SharedWeights
from dreamfleet.trainers.models.timesteps import TimestepDraw, make_timestep_draw

Component = Literal["denoiser", "vae", "text_encoder"]
#: Components that a method can request. A family may split one into several parts (SDXL has two text encoders).
COMPONENTS: tuple[Component, ...] = ("denoiser", "vae", "text_encoder")

# Maximum number of pixels that a VAE encodes or decodes in one pass. Larger passes are no faster on a GPU, and at
# 512 px they would determine the peak memory of a run.
VAE_PIXELS = 8 * 256**2

PromptEncoder = Callable[[Sequence[str], Tensor], Condition]  # texts and their token ids -> condition


class DiffusionModel(ABC):
    """A loaded text-to-image model of one family. Parts that were not requested are None."""

    #: key of the denoiser in :meth:`modules`, and the name of its parameter group
    denoiser_name: ClassVar[str]
    #: class names of the denoiser's repeated blocks; torch.compile is applied per block, once for each class
    block_classes: ClassVar[tuple[str, ...]] = ()
    #: names of the parts that stay in float32, so that latents do not depend on the precision of a run
    float32_parts: ClassVar[tuple[str, ...]] = ("vae",)
    #: whether the denoiser takes :attr:`Condition.time_ids` (image sizes) as an input
    uses_time_ids: ClassVar[bool] = False

    folder: str  #: name, path or address that the model was loaded from
    content_hash: str  #: identifies the model; compared between the ranks of a run
    encoder_hash: str = ""  #: hash of the VAE's encoder; part of the key of cached latents
    clip_skip: int = 1
    max_token_length: int = 75
    vae: Any
    zeros_for_empty_prompt: bool = False  #: whether an empty negative prompt is encoded as zeros
    prompt_encoder: PromptEncoder | None = None  #: replaces :meth:`encode_tokens` when sampling
    weights: SharedWeights | None = None  #: of a copy that :meth:`share` returned
    _lent: SharedWeights | None = None  # that of the copies which share() returns
    loras: tuple[tuple[LoraFile, float | adapters.Strength], ...] = ()  #: those applied; see `lora.set_loras`

    # Identity and parts

    @property
    @abstractmethod
    def title(self) -> str:
        """Human-readable name of the family, such as "Stable Diffusion 1"."""

    @property
    @abstractmethod
    def prediction_type(self) -> str:
        """What the denoiser predicts, such as ``epsilon``, ``v_prediction`` or ``velocity``."""

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """Return the loaded parts by name. Folders, parameters and LoRA files use the same names."""

    @property
    @abstractmethod
    def text_encoders(self) -> list[Any]:
        """The loaded text encoders. Learned vectors are appended to their token tables (see `embeddings`)."""

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
        """The last component of :attr:`folder`."""
        return self.folder.rstrip("/").rpartition("/")[2]

    def short_hash(self) -> str | None:
        """Return the 10 hex digits by which the webui identifies the model, None if it has no weight files."""
        return None

    def require_support(self, name: str) -> None:
        """Raise ModelError with the reason if the model does not support the method ``name``."""
        if reason := self.unsupported.get(name):
            raise ModelError(f"{self.folder}: {reason}")

    @property
    def denoiser(self) -> Any:
        """The network that predicts noise or velocity from noised latents: a U-Net or a transformer."""
        return self.modules().get(self.denoiser_name)

    @property
    def denoiser_dtype(self) -> torch.dtype:
        """Dtype of the denoiser's parameters."""
        return next(p.dtype for p in self.denoiser.parameters() if p.is_floating_point())

    @property
    def text_device(self) -> torch.device:
        """Device of the text encoders; token ids must be on it."""
        return next(self.text_encoders[0].parameters()).device

    def trainable_parts(self, *, text: bool) -> dict[str, nn.Module]:
        """Return by name the parts that gradients pass through: the denoiser and, with ``text``, the text encoders."""
        encoders = {id(encoder) for encoder in self.text_encoders} if text else set()
        return {
            name: part
            for name, part in self.modules().items()
            if name == self.denoiser_name or id(part) in encoders
        }

    def unread_layers(self) -> list[nn.Module]:
        """Return the text encoder layers that the loss does not depend on; their parameters get no gradient."""
        return []

    def freeze(self) -> None:
        """Set every part to eval mode without gradients; a method then enables gradients for what it trains."""
        for part in self.modules().values():
            part.requires_grad_(False).eval()

    def share(self) -> Self:
        """Return a copy of the module tree with the same parameters, buffers, VAE and tokenizers.

        Words, adapters and hypernetworks that are added to the copy do not change this model. Copies that are moved to
        one device in one precision share their frozen weights there, and leave this model where it is.
        """
        if self._lent is None:
            self._lent = self.weights or SharedWeights(self.modules().values())
        weights = self._lent
        kept = [weights, *weights.tensors, *self.tokenizers, *([self.vae] if self.vae is not None else [])]
        copied = copy.deepcopy(self, {id(one): one for one in kept})
        copied.weights = weights
        return copied

    def to(
        self,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        *,
        home: torch.device | str | None = None,
        sharded: Collection[str] = (),
    ) -> Self:
        """Move the parts to ``device`` and cast those without trainable parameters to ``dtype``.

        In a part with LoRA adapters, everything except the adapters is cast. If ``home`` is given, trainable parts
        without adapters and the parts named in ``sharded`` are moved to ``home`` instead of ``device``.
        :attr:`float32_parts` keep their precision.
        """
        for name, part in self.modules().items():
            trains, adapted = any(p.requires_grad for p in part.parameters()), adapters.has_adapters(part)
            waits = home is not None and (name in sharded or (trains and not adapted))
            if self.weights is not None and not waits and not (trains and not adapted):
                half = None if name in self.float32_parts else dtype
                self.weights.place(part, torch.device(device), half)
            if adapted and dtype is not None:
                adapters.cast_frozen(part, dtype)
            # Move and cast in one call, so that the GPU never holds the frozen parts in float32. diffusers' own method
            # warns of parts that are to stay in float32, even if there are none; float32_parts says which do.
            precision = None if trains or name in self.float32_parts else dtype
            nn.Module.to(part, home if waits else device, precision)
        return self

    def checkpoint_activations(self, *, text: bool) -> None:
        """Enable activation checkpointing in the denoiser and, with ``text``, in the text encoders."""
        self.denoiser.enable_gradient_checkpointing()
        # diffusers checkpoints only in training mode, so a frozen denoiser that gradients pass through needs it too.
        self.denoiser.train()
        for encoder in self.text_encoders if text else ():
            # transformers 5.23 renamed the method, and 6 drops the old name.
            enable = getattr(encoder, "activation_checkpointing_enable", None)
            (enable or encoder.gradient_checkpointing_enable)()
            for module in encoder.modules():
                # transformers also requires training mode. Set it on these modules only, so that the dropout of a
                # frozen encoder stays off.
                module.training = module.training or getattr(module, "gradient_checkpointing", False)

    # Images and latents

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Number of latent channels, C."""

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
        """Image side, in pixels, that the model was trained at."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape ``(C, H, W)`` of the latents of an image of this size in pixels."""
        return self.latent_channels, height // self.vae_factor, width // self.vae_factor

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pixels ``[B, 3, height, width]`` in [-1, 1] -> mean and std of unscaled latents ``[B, C, H, W]``."""

    @abstractmethod
    def scale_latents(self, latents: Tensor) -> Tensor:
        """Scale (and shift) the VAE's latents ``[B, C, H, W]`` as the denoiser expects them."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents ``[B, C, H, W]`` -> pixels ``[B, 3, height, width]`` in about [-1, 1]."""

    # Prompts

    @property
    def num_chunks(self) -> int:
        """Number of chunks of 75 tokens that a prompt is encoded in."""
        return self.max_token_length // 75

    @abstractmethod
    def tokenize(self, prompts: Sequence[str], swap: Mapping[str, str] | None = None) -> Tensor:
        """Return the token ids ``[B, ..., T]`` of prompts without prompt syntax.

        ``swap`` maps learned words to the learned words whose ids are used instead.
        """

    @abstractmethod
    def tokenize_weighted(
        self, texts: Sequence[Sequence[Piece]], *, least: int = 1
    ) -> tuple[Tensor, list[list[float]]]:
        """Return the token ids ``[B, ..., T]`` of parsed texts and the attention weight of each token ``[B][T]``.

        All rows have as many chunks as the longest text needs, but at least ``least``.
        """

    @abstractmethod
    def encode_tokens(self, input_ids: Tensor) -> Condition:
        """Encode token ids from :meth:`tokenize`; the condition has no ``time_ids``."""

    def weigh_tokens(self, condition: Condition, weights: Tensor, shares: Tensor) -> Condition:
        """Apply attention weights ``[B, T]`` to encoded texts; text b counts ``shares[b]`` times in means over texts.

        Raises ModelError if the family does not support attention weights.
        """
        raise ModelError(f"{self.title} does not support attention weights in prompts; remove them")

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Tokenize and encode prompts without prompt syntax, on the device of the text encoders."""
        return self.encode_tokens(copy_to_device(self.tokenize(prompts), self.text_device))

    @abstractmethod
    def empty_condition(self, num: int) -> Condition:
        """Return an uninitialised condition of ``num`` samples with the real shapes and dtypes, for memory planning."""

    # Diffusion: noising, prediction, target and loss

    @abstractmethod
    def draw_timestep(self, rng: np.random.Generator) -> float:
        """Return a random timestep for one training sample."""

    @abstractmethod
    def even_timesteps(self, count: int) -> Tensor:
        """Return ``count`` evenly spaced timesteps ``[count]`` over the whole range, for held-out losses."""

    @abstractmethod
    def noise_level(self, timesteps: Tensor) -> Tensor:
        """Return the position ``[B]`` of timesteps in the noise process, from 0 (least noise) to 1 (most noise)."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the latents ``[B, C, H, W]`` with noise added according to their timesteps ``[B]``."""

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Return the denoiser's prediction ``[B, C, H, W]`` for noised latents, in the precision it computes in."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the training target of the denoiser, ``[B, C, H, W]``."""

    @abstractmethod
    def clean_estimate(self, predicted: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Return the clean latents ``[B, C, H, W]`` that a prediction implies, in float32."""

    @property
    def num_timesteps(self) -> int | None:
        """Number of timesteps of the noise process, from 0 (least noise) on; None if time is continuous."""
        return None

    def signal_to_noise(self, timesteps: Tensor, *, needed_by: str) -> Tensor:
        """Return the signal-to-noise ratio at each timestep ``[B]``.

        Raises ModelError that names ``needed_by``, a key of the recipe, if the family has none.
        """
        raise ModelError(f"{self.title} does not support {needed_by}; remove it")

    @abstractmethod
    def make_sampler(self, name: str) -> Any:
        """Return the sampler ``name`` (``ddim``, ``euler_a``, ``dpm++``) with the scheduler interface of diffusers.

        It must have ``set_timesteps``, ``timesteps``, ``init_noise_sigma``, ``scale_model_input`` and ``step``.
        """

    @property
    def ends_in_noise(self) -> bool:
        """Whether the last timestep is pure noise (zero terminal SNR)."""
        return False

    def draw_noise(
        self,
        keys: Sequence[keyed_noise.SampleKey],
        shape: tuple[int, ...],
        options: NoiseConfig | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return noise ``[B, *shape]`` and timesteps ``[B]``, drawn per sample from a generator seeded by its key."""
        draw = self.timestep_draw(options or NoiseConfig())
        return keyed_noise.draw_noise(keys, shape, draw_timestep=draw, options=options)

    def timestep_draw(self, options: NoiseConfig) -> TimestepDraw:
        """Return the function that draws timesteps: :meth:`draw_timestep`, or that of the recipe's options.

        Raises RecipeError for limits that are not timesteps of the model, ModelError if it has no numbered timesteps.
        """
        if not options.chooses_timesteps:
            return self.draw_timestep
        if self.num_timesteps is None:
            raise ModelError(
                f"{self.title} has no numbered timesteps, which train.timestep_sampling, min_timestep and "
                "max_timestep need; remove them"
            )
        return make_timestep_draw(options, self.num_timesteps, model=self.folder)

    def loss(self, predicted: Tensor, batch: Mapping[str, Any], options: LossConfig = PLAIN) -> Tensor:
        """Return the loss per sample ``[B]`` of a prediction, see :func:`denoising_losses`; by default mean squared."""
        return denoising_losses(self, predicted, batch, options)

    # Files

    @abstractmethod
    def save_folder(self, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the model as a folder that the family's diffusers pipeline loads."""

    def save_file(
        self, path: Path, *, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
    ) -> Path:
        """Write the whole model as one ``.safetensors`` or ``.ckpt`` file. Raises ModelError if there is no layout."""
        raise ModelError(f"{self.title} has no single-file layout here; export the diffusers folder")

    def lora_layers(
        self, targets: Any, *, parts: Sequence[str], unread: Sequence[nn.Module] = ()
    ) -> dict[str, list[str]]:
        """Return, for each part, the names of the layers that get LoRA matrices.

        ``targets`` is the recipe's `method.lora_target_modules`. Modules in ``unread``, on which the loss does not
        depend, get none. Raises ModelError if the family does not support LoRA training.
        """
        raise ModelError(f"{self.title} does not support LoRA training; remove method.lora_rank")

    def count_blocks(self) -> dict[str, int]:
        """Return the number of the denoiser's blocks by section, in order, such as embed, down, mid, up and out.

        Raises ModelError if the family has no numbered blocks.
        """
        raise ModelError(
            f"{self.title} has no numbered blocks, which method.block_lr and down_lr_weight, mid_lr_weight and "
            "up_lr_weight need; use method.lr_factors"
        )

    def block_of(self, layer: str) -> tuple[str, int]:
        """Return the section and number of the block that a layer of the denoiser is in."""
        raise ModelError(f"{self.title} has no numbered blocks")

    def read_lora(self, path: Path) -> LoraFile:
        """Read a LoRA file. Raises FormatError if it is not one."""
        return read_lora(path)

    def write_kohya_lora(self, file: LoraFile, path: Path, *, dtype: torch.dtype) -> Path:
        """Write a LoRA in kohya's key layout. Raises ModelError if the family has none."""
        raise ModelError(f"{self.title} has no kohya layout for LoRA here; export diffusers_lora")


class ModelFamily(Protocol):
    """Loads the models of one family."""

    def recognises(self, config: ModelConfig) -> bool:
        """Return whether the model that a ``model:`` section names is of this family. Must read no weights."""
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
    """Return the family that recognises the model of a ``model:`` section; Stable Diffusion if no other one does."""
    others = (family for name, family in FAMILIES.items() if name != DEFAULT_FAMILY)
    return next((family for family in others if family.recognises(config)), FAMILIES.get(DEFAULT_FAMILY))


def load_model(config: ModelConfig, needs: Collection[str] = COMPONENTS) -> DiffusionModel:
    """Load the components in ``needs`` of a model in float32, frozen. Raises ModelError for missing or broken parts."""
    quiet_libraries()
    return family_of(config).load(config, needs)


def load_shape(config: ModelConfig, needs: Collection[str] = COMPONENTS) -> DiffusionModel:
    """Build the components in ``needs`` on torch's meta device, without weights and without downloading."""
    return family_of(config).load_shape(config, needs)
