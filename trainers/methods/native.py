"""Native training: the model learns on from captioned pictures, as it was trained in the first place.

Source: Rombach et al. 2022 (arXiv 2112.10752); naifu-diffusion and kohya's `fine_tune.py` for what is around it. That
is buckets, tags, long prompts, masks, noise schedules and averages: other sections' keys, which serve every method.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from dreamfleet.trainers.methods.base import Method, MethodConfig, ParamGroup, Setting, register
from dreamfleet.trainers.methods.whole_model import export_checkpoints, learning_parts, part_groups
from dreamfleet.trainers.sd.model import StableDiffusion


class NativeConfig(MethodConfig):
    """The ``method:`` section of native training."""

    name: Literal["native"] = "native"
    train_text_encoder: bool = Field(False, description="the text encoder learns as well")


@register
class Native(Method):
    """Teach the model a whole set of captioned pictures: all of the U-Net learns. A whole new checkpoint."""

    name: ClassVar[str] = "native"
    Config = NativeConfig
    formats = ("diffusers", "safetensors")
    all_formats = ("diffusers", "safetensors", "ckpt")

    def __init__(self, config: NativeConfig, model: StableDiffusion, setting: Setting):
        super().__init__(config, model, setting)
        self.learning = learning_parts(model, train_text_encoder=config.train_text_encoder)

    @property
    def trains_text(self) -> bool:
        return self.config.train_text_encoder

    def groups(self) -> list[ParamGroup]:
        return part_groups(self.learning)

    def export(
        self,
        folder: Path,
        name: str,
        *,
        formats: Sequence[str] | None,
        step: int,
        metadata: dict[str, str],
        precision: str,
    ) -> list[Path]:
        """Write ``diffusers/`` and ``NAME.safetensors`` (single file, webui keys); ``NAME.ckpt`` on request."""
        return export_checkpoints(
            self.model,
            folder,
            name,
            forms=self.chosen_formats(formats),
            metadata=metadata,
            precision=precision,
        )
