"""The ``method:`` section of native training."""

from __future__ import annotations

from typing import ClassVar, Literal

from dreamfleet.trainers.config.methods.whole_model import WholeModelConfig


class NativeConfig(WholeModelConfig):
    """The options of native training."""

    implementation: ClassVar[str] = "dreamfleet.trainers.methods.native:Native"
    display_name: ClassVar[str] = "Native fine-tuning"
    summary: ClassVar[str] = (
        "Trains the whole U-Net, or a LoRA, on a set of captioned images. A full checkpoint."
    )

    name: Literal["native"] = "native"
