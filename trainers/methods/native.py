"""Native training: fine-tunes the model on captioned images with the objective of its original training.

Sources: Rombach et al. 2022 (arXiv 2112.10752); naifu-diffusion and kohya's `fine_tune.py` for buckets, tags,
long prompts, masks, noise schedules and weight averages, which other recipe sections configure for every
method.
"""

from __future__ import annotations

from pathlib import Path

from dreamfleet.trainers.config.methods.native import NativeConfig
from dreamfleet.trainers.methods.base import Setting
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.methods.lora_regularization import limit_norms
from dreamfleet.trainers.methods.whole_model import (
    export_tuned,
    learning_parts,
    part_groups,
    possible_formats,
    usual_formats,
)
from dreamfleet.trainers.models.family import DiffusionModel
from dreamfleet.trainers.optim.param_group import ParamGroup


class Native(DiffusionMethod):
    """Fine-tune the model on a set of captioned images. Exports a whole checkpoint, or a LoRA."""

    def __init__(self, config: NativeConfig, model: DiffusionModel, setting: Setting):
        super().__init__(config, model, setting)
        self.learning = learning_parts(model, config)
        self.formats = usual_formats(config)

    @property
    def all_formats(self) -> tuple[str, ...]:
        return possible_formats(self.config)

    @property
    def trains_text(self) -> bool:
        return self.config.train_text_encoder

    def groups(self) -> list[ParamGroup]:
        return part_groups(self.learning, self.config, self.model)

    def after_step(self) -> None:
        if self.config.scale_weight_norms is not None:
            limit_norms(self.model, self.config.scale_weight_norms)

    def write(self, order: Export) -> list[Path]:
        """Write the tuned model as a folder and a single file, or a LoRA in two layouts: see `export_tuned`."""
        return export_tuned(self.config, self.model, order)
