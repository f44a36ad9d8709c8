"""The ``method:`` section of Aesthetic Gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AliasChoices, Field

from dreamfleet.trainers.config.method import MethodConfig, SearchSpace
from dreamfleet.trainers.config.model import HUB_MODEL
from dreamfleet.trainers.config.train import DENOISING_KEYS

Slerp = Literal["off", "channels", "tokens"]


class AestheticGradientsConfig(MethodConfig):
    """The options of Aesthetic Gradients; all except ``clip`` affect only how previews are generated."""

    implementation: ClassVar[str] = "dreamfleet.trainers.methods.aesthetic_gradients:AestheticGradients"
    summary: ClassVar[str] = (
        "Learns the mean CLIP vector of a set of images; when images are generated, the text encoder is tuned towards "
        "it for each prompt. Kilobytes; slower generation."
    )
    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("engine.zero_stage", "engine.use_ema"), "which sums a mean with an optimizer of its own"
        ),
        "data.cache_dir": "which trains on images, not latents",
        **{
            key: "which adds no noise"
            for key in DENOISING_KEYS
            if key not in ("train.snr_gamma", "train.noise_offset")  # older recipes may have them
        },
    }
    no_plan: ClassVar[str | None] = (
        "trains no weights: a step needs the memory of CLIP on train.train_batch_size images, and generation that of "
        "four copies of the text encoder"
    )
    artifacts: ClassVar[tuple[str, ...]] = ("aesthetic", "checkpoint")
    search_spaces: ClassVar[Mapping[str, SearchSpace]] = {
        "aesthetic_gradients": {
            "method.aesthetic_lr": {"distribution": "loguniform", "lower": 1e-5, "upper": 1e-3},
            "method.aesthetic_steps": {"distribution": "randint", "lower": 1, "upper": 30},
            "method.aesthetic_weight": {"distribution": "uniform", "lower": 0.5, "upper": 1.0},
        },
    }

    name: Literal["aesthetic_gradients"] = "aesthetic_gradients"
    clip: Annotated[str | None, HUB_MODEL] = Field(
        None,
        description="the CLIP model that the text encoder belongs to, a folder or a hub name; default: the model's "
        "own, "
        "or openai/clip-vit-large-patch14 for SD 1.x",
    )
    aesthetic_steps: int = Field(
        5, ge=0, le=1000, description="tuning steps of the text encoder's copy for each prompt"
    )
    aesthetic_lr: float = Field(1e-4, ge=0, lt=1, description="learning rate of these steps (Adam)")
    aesthetic_weight: float = Field(
        0.9, ge=0, le=1, description="weight of the tuned encoding in the mix with the original one"
    )
    aesthetic_slerp: Slerp = Field(
        "off",
        description="spherical instead of linear mixing: over each token's channels, or over tokens as in the webui's "
        "extension",
    )
    aesthetic_text: str = Field(
        "",
        validation_alias=AliasChoices("aesthetic_text", "aesthetic_imgs_text"),
        description="a text whose CLIP vector the mean is rotated towards",
    )
    aesthetic_text_negative: bool = Field(False, description="rotate away from the text instead")
    aesthetic_slerp_angle: float = Field(
        0.1, ge=0, le=1, description="fraction of the angle to the text that it is rotated by"
    )
    baked_prompts: list[str] = Field(
        [], description="prompts over which the text encoder of the diffusers export is tuned, all at once"
    )
