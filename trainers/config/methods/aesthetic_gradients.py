"""The ``method:`` section of aesthetic_gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AliasChoices, Field

from dreamfleet.trainers.config.method import MethodConfig
from dreamfleet.trainers.config.model import HUB_MODEL

Slerp = Literal["off", "channels", "tokens"]


class AestheticGradientsConfig(MethodConfig):
    """The ``method:`` section of Aesthetic Gradients; all but ``clip`` says how previews are drawn."""

    implementation: ClassVar[str] = "dreamfleet.trainers.methods.aesthetic_gradients:AestheticGradients"
    summary: ClassVar[str] = (
        "Teach a taste: the mean CLIP vector of a set; prompts are tuned towards it when drawn. Kilobytes, "
        "slower drawing."
    )
    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("engine.zero_stage", "engine.use_ema"), "which adds up a mean of its own"),
        "data.cache_dir": "which sees pictures, not latents",
    }
    no_plan: ClassVar[str | None] = (
        "trains no weights; its steps need what CLIP needs to see train.train_batch_size pictures, and drawing four "
        "copies of the text encoder"
    )
    artifacts: ClassVar[tuple[str, ...]] = ("aesthetic", "checkpoint")

    name: Literal["aesthetic_gradients"] = "aesthetic_gradients"
    clip: Annotated[str | None, HUB_MODEL] = Field(
        None,
        description="the CLIP that the model's text encoder is a part of, a folder or a hub name; when left out the "
        "model's own, or for SD 1.x openai/clip-vit-large-patch14",
    )
    aesthetic_steps: int = Field(
        5, ge=0, le=1000, description="steps a prompt's copy of the text encoder is tuned when drawn"
    )
    aesthetic_lr: float = Field(1e-4, ge=0, lt=1, description="Adam's learning rate of these steps")
    aesthetic_weight: float = Field(0.9, ge=0, le=1, description="share of the tuned encoding")
    aesthetic_slerp: Slerp = Field(
        "off", description="mix on an arc: over a token's channels, or as the webui's extension over tokens"
    )
    aesthetic_text: str = Field(
        "",
        validation_alias=AliasChoices("aesthetic_text", "aesthetic_imgs_text"),
        description="a text that the vector is bent towards",
    )
    aesthetic_text_negative: bool = Field(False, description="bend it away from the text")
    aesthetic_slerp_angle: float = Field(0.1, ge=0, le=1, description="how far it is bent; 1: all the way")
    baked_prompts: list[str] = Field(
        [], description="prompts that the text encoder of the diffusers export is tuned over, all at once"
    )
