"""The ``method:`` section of DreamBooth."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from dreamfleet.trainers.config.methods.whole_model import WholeModelConfig


class DreamBoothConfig(WholeModelConfig):
    """The options of DreamBooth."""

    implementation: ClassVar[str] = "dreamfleet.trainers.methods.dreambooth:DreamBooth"
    display_name: ClassVar[str] = "DreamBooth"
    summary: ClassVar[str] = (
        "Trains the whole U-Net, or a LoRA, on a subject named by a rare word; keeps the most detail. A full "
        "checkpoint."
    )

    name: Literal["dreambooth"] = "dreambooth"
    with_prior_preservation: bool = Field(
        False, description="also train on generated images of the subject's class"
    )
    prior_loss_weight: float = Field(1.0, ge=0, description="weight of the class images' loss")
    num_class_images: int = Field(
        100, ge=1, description="class images per concept; missing ones are generated"
    )
    sample_batch_size: int = Field(4, ge=1, description="batch size for generating class images")
    prior_generation_steps: int = Field(50, ge=1, description="sampler steps for class images")
    prior_generation_guidance: float = Field(7.5, ge=1, description="guidance scale for class images")
