"""The ``method:`` section of native."""

from __future__ import annotations

from typing import ClassVar, Literal

from dreamfleet.trainers.config.methods.whole_model import WholeModelConfig


class NativeConfig(WholeModelConfig):
    """The ``method:`` section of native training."""

    implementation: ClassVar[str] = "dreamfleet.trainers.methods.native:Native"
    summary: ClassVar[str] = (
        "Teach the model a whole set of captioned pictures: all of the U-Net learns. A whole new checkpoint."
    )

    name: Literal["native"] = "native"
