"""The ``method:`` section of dreambooth."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from dreamfleet.trainers.config.methods.whole_model import WholeModelConfig


class DreamBoothConfig(WholeModelConfig):
    """The ``method:`` section of DreamBooth."""

    implementation: ClassVar[str] = "dreamfleet.trainers.methods.dreambooth:DreamBooth"
    summary: ClassVar[str] = (
        "Teach the model a subject: all of the U-Net learns, details are kept. A whole new checkpoint."
    )

    name: Literal["dreambooth"] = "dreambooth"
    with_prior_preservation: bool = False
    prior_loss_weight: float = Field(1.0, ge=0)
    num_class_images: int = Field(100, ge=1, description="per concept; missing ones are generated")
    sample_batch_size: int = Field(4, ge=1, description="class pictures generated at a time")
    prior_generation_steps: int = Field(50, ge=1, description="sampler steps of a generated class picture")
    prior_generation_guidance: float = Field(7.5, ge=1)
