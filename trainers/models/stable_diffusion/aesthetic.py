"""Aesthetic Gradients at sampling time: a copy of the text encoder is tuned for each prompt towards a CLIP vector.

Sources: arXiv 2209.12330, github.com/vicgalle/stable-diffusion-aesthetic-gradients, and AUTOMATIC1111's webui extension
of it, whose options are used here. Shapes: B prompts, T tokens, D width of the text encoder, P width of CLIP's joint
image and text space.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamfleet.datasets.errors import ModelError, UserError
from dreamfleet.trainers.config.methods.aesthetic_gradients import AestheticGradientsConfig, Slerp
from dreamfleet.trainers.config.model import POCKET
from dreamfleet.trainers.models.condition import Condition
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.models.formats.aesthetic import read_aesthetic
from dreamfleet.trainers.models.pretrained import pocket_folder
from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion
from dreamfleet.trainers.models.vision.clip import TEXT_PROJECTION, ClipScorer, load_clip

# Width of a text encoder -> the CLIP that it comes from; 160 is the width of the pocket model.
CLIPS = {768: "openai/clip-vit-large-patch14", 160: POCKET}
KEPT_PROMPTS = 256  # size of the cache of encoded prompts: 60 MB for SD 1.x


@dataclass(frozen=True)
class AestheticSettings:
    """Options of tuning prompts towards a vector; the defaults are the extension's. Raises UserError if out of range.

    ``weight`` interpolates from the untuned to the tuned encoding, linearly or spherically (``slerp``: over the
    channels of each token, or over the tokens of each channel as in the extension). ``text`` moves the vector by
    ``slerp_angle`` (0: not at all, 1: fully) towards the CLIP features of a text or, with ``text_negative``, away from
    them.
    """

    steps: int = 5
    learning_rate: float = 1e-4
    weight: float = 0.9
    slerp: Slerp = "off"
    text: str = ""
    text_negative: bool = False
    slerp_angle: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 0 or not 0 <= self.learning_rate < 1:
            raise UserError(
                f"aesthetic steps {self.steps} at a learning rate of {self.learning_rate}: give 0 steps or more, and a "
                "rate from 0 to 1, such as 1e-4"
            )
        for name in ("weight", "slerp_angle"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"aesthetic {name} {getattr(self, name)}: give a number from 0 to 1")
        if self.slerp not in get_args(Slerp):
            raise UserError(f"aesthetic slerp {self.slerp!r}: choose from {', '.join(get_args(Slerp))}")


class AestheticEncoder:
    """Encodes each prompt with a copy of the text encoder that is tuned for it towards a vector ``[1, P]``.

    Each copy starts from the model's own encoder, so an encoding depends only on its prompt; encodings are cached. As
    in the original, the empty prompt is not tuned, so guidance points from the untuned to the tuned encoding. Raises
    ModelError for a vector of another CLIP.
    """

    def __init__(
        self,
        model: StableDiffusion,
        vector: Tensor,
        *,
        clip: ClipScorer,
        settings: AestheticSettings | None = None,
    ):
        self.model, self.clip, self.settings = model, clip, settings or AestheticSettings()
        self.vector = vector.detach().float().cpu().reshape(1, -1).clone()
        there = len(clip.text_projection)
        if self.vector.shape[1] != there:
            raise ModelError(
                f"the aesthetic vector has {self.vector.shape[1]} numbers, but {clip.name}'s space has {there}: it was "
                "made with another CLIP"
            )
        self.target = aim(self.vector, clip, self.settings)
        # prompt -> cosine of its CLIP features with the target, before the first step and after each one
        self.cosines: dict[str, list[float]] = {}
        self._contexts: OrderedDict[tuple[str, int], Tensor] = (
            OrderedDict()
        )  # cache, by (prompt, number of tokens)
        self._loras = model.loras  # the LoRAs that were applied when the cached contexts were encoded

    def __call__(self, prompts: Sequence[str], ids_BT: Tensor | None = None) -> Condition:
        """Encode texts with their token ids ``[B, T]``; without ids the texts have no prompt syntax."""
        return Condition(self.contexts(prompts, ids_BT))

    @torch.no_grad()
    def contexts(self, prompts: Sequence[str], ids_BT: Tensor | None = None) -> Tensor:
        """Return the contexts ``[B, T, D]`` of texts; without ids the texts have no prompt syntax."""
        device = next(self.model.text_encoder.parameters()).device
        every_BT = (self.model.tokenize(prompts) if ids_BT is None else ids_BT).to(device)
        if self.model.loras is not self._loras:
            self._contexts.clear()
            self._loras = self.model.loras
        contexts = []
        for prompt, ids in zip(prompts, every_BT, strict=True):
            key = (prompt, len(ids))
            known = self._contexts.get(key)
            if known is None:
                known = self._contexts[key] = self._encode(prompt, ids[None])[0]
            self._contexts.move_to_end(key)
            contexts.append(known)
        while len(self._contexts) > KEPT_PROMPTS:
            self.cosines.pop(self._contexts.popitem(last=False)[0][0], None)
        return torch.stack(contexts)

    def _encode(self, prompt: str, ids_1T: Tensor) -> Tensor:
        plain, settings = self.model.encode_text(ids_1T), self.settings
        if not (prompt.strip() and settings.steps and settings.learning_rate and settings.weight):
            return plain
        tuned, self.cosines[prompt] = tune_text_encoder(
            self.model,
            ids_1T,
            self.target.to(ids_1T.device),
            projection=self.clip.text_projection.to(ids_1T.device),
            steps=settings.steps,
            learning_rate=settings.learning_rate,
        )
        # Encode with a copy of the model, so that clip_skip and its other text options apply.
        towards = dataclasses.replace(self.model, text_encoder=tuned).encode_text(ids_1T)
        mixed = mix(plain.float(), towards.float(), settings.weight, settings.slerp)
        return mixed.to(plain.dtype)


def settings_of(config: AestheticGradientsConfig) -> AestheticSettings:
    """Return the settings in a recipe's ``method:`` section."""
    return AestheticSettings(
        steps=config.aesthetic_steps,
        learning_rate=config.aesthetic_lr,
        weight=config.aesthetic_weight,
        slerp=config.aesthetic_slerp,
        text=config.aesthetic_text,
        text_negative=config.aesthetic_text_negative,
        slerp_angle=config.aesthetic_slerp_angle,
    )


def require_sd1(model: DiffusionModel) -> StableDiffusion:
    """Return the model if it is Stable Diffusion 1.x; raise ModelError otherwise."""
    model.require_support("aesthetic_gradients")
    if not isinstance(model, StableDiffusion):
        raise ModelError(
            f"{model.folder}: Aesthetic Gradients are for Stable Diffusion 1.x, not {model.title}"
        )
    return model


def apply_aesthetic(
    model: DiffusionModel,
    path: str | os.PathLike[str],
    settings: AestheticSettings | None = None,
    clip: str | None = None,
) -> AestheticEncoder:
    """Read an aesthetic vector and make it the model's prompt encoder for sampling; return the encoder.

    ``clip``: folder or hub name of the CLIP that the text encoder comes from; see :func:`clip_of` for the default.
    Raises FormatError if the file is not an aesthetic vector, ModelError for a vector of another CLIP.
    """
    model = require_sd1(model)
    encoder = AestheticEncoder(model, read_aesthetic(path), clip=clip_of(model, clip), settings=settings)
    model.prompt_encoder = encoder
    return encoder


def clip_of(model: StableDiffusion, name: str | None = None) -> ClipScorer:
    """Load the CLIP that a model's text encoder comes from: ``name``, the one in the model folder, or SD 1.x's.

    Raises ModelError if it is unknown, or if the width of its text tower differs from the model's.
    """
    if name is None:
        folder = pocket_folder() if model.folder == POCKET else Path(model.folder).expanduser()
        name = model.folder if (folder / TEXT_PROJECTION).is_file() else CLIPS.get(model.context_width)
    if name is None:
        raise ModelError(
            f"{model.folder}: its text encoder, {model.context_width} wide, belongs to no known CLIP; name the CLIP "
            "with method.clip or --aesthetic-clip, as a folder or on the hub"
        )
    clip = load_clip(name)
    if (width := clip.text_projection.shape[1]) != model.context_width:
        raise ModelError(
            f"{name}'s text tower is {width} wide, {model.folder}'s {model.context_width}: name the CLIP that this "
            "model's text encoder belongs to"
        )
    return clip


def aim(vector_1P: Tensor, clip: ClipScorer, settings: AestheticSettings) -> Tensor:
    """Return the unit vector ``[1, P]`` that prompts are tuned towards: the aesthetic vector, moved by ``text``.

    Unlike in the extension, the features of ``text`` are normalised, since they would otherwise outweigh the vector.
    """
    vector_1P = F.normalize(vector_1P, dim=-1)
    if not settings.text.strip():
        return vector_1P
    other_1P = clip.text_features([settings.text])
    if settings.text_negative:
        other_1P = F.normalize(vector_1P - other_1P, dim=-1)
    return F.normalize(slerp(vector_1P, other_1P, settings.slerp_angle, dim=-1), dim=-1)


def tune_text_encoder(
    model: StableDiffusion,
    ids_BT: Tensor,
    target_1P: Tensor,
    *,
    projection: Tensor,
    steps: int,
    learning_rate: float,
) -> tuple[Any, list[float]]:
    """Tune a float32 copy of the text encoder to increase the cosine of the prompts' CLIP features with the target.

    Adam maximises the mean cosine; CLIP's ``projection`` ``[P, D]`` is fixed. Each chunk of 77 tokens counts as one
    prompt. Returns the copy, and the mean cosine before the first step and after each one.
    """
    encoder: Any = copy.deepcopy(model.text_encoder).float().eval().requires_grad_(True)
    chunks_NT = ids_BT.reshape(-1, model.tokenizer.model_max_length)
    ends_N = (chunks_NT == model.tokenizer.eos_token_id).int().argmax(dim=1)

    def cosine() -> Tensor:
        hidden_NTD = encoder(chunks_NT)[0]
        pooled_ND = hidden_NTD[torch.arange(len(chunks_NT)), ends_N]
        return F.cosine_similarity(pooled_ND @ projection.T, target_1P).mean()

    optimizer = torch.optim.Adam(encoder.parameters(), lr=learning_rate)
    cosines = []
    with torch.autocast(ids_BT.device.type, enabled=False):
        with torch.enable_grad():
            for _ in range(steps):
                now = cosine()
                optimizer.zero_grad(set_to_none=True)
                (-now).backward()
                optimizer.step()
                cosines.append(float(now.detach()))
        with torch.no_grad():
            cosines.append(float(cosine()))
    return encoder.requires_grad_(False), cosines


def mix(plain_BTD: Tensor, tuned_BTD: Tensor, weight: float, how: Slerp) -> Tensor:
    """Interpolate by ``weight`` from the untuned to the tuned encoding, linearly or spherically."""
    if how == "off":
        return torch.lerp(plain_BTD, tuned_BTD, weight)
    return slerp(plain_BTD, tuned_BTD, weight, dim=1 if how == "tokens" else -1)


def slerp(start: Tensor, end: Tensor, weight: float, *, dim: int) -> Tensor:
    """Interpolate spherically between vectors along ``dim``; linearly where they are nearly parallel.

    The formula is the extension's, except that the extension returns NaN for parallel vectors.
    """
    cosine = F.cosine_similarity(start, end, dim=dim).unsqueeze(dim).clamp(-1, 1)
    angle = torch.acos(cosine)
    scale = torch.sin(angle)
    straight = scale < 1e-4
    scale = torch.where(straight, torch.ones_like(scale), scale)
    arc = torch.sin((1 - weight) * angle) / scale * start + torch.sin(weight * angle) / scale * end
    return torch.where(straight, torch.lerp(start, end, weight), arc)
