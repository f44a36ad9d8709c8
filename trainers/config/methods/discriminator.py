"""The ``method:`` section of discriminator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dreamfleet.datasets.config import MOST_CLASSES
from dreamfleet.datasets.path_field import PathField
from dreamfleet.trainers.config.method import MethodConfig
from dreamfleet.trainers.config.model import HUB_MODEL

INPUT_SIZE = 384  # pixels of a side, where a file does not say


class DiscriminatorConfig(MethodConfig):
    """The ``method:`` section of the discriminator."""

    implementation: ClassVar[str] = "dreamfleet.trainers.methods.discriminator:DiscriminatorTraining"
    summary: ClassVar[str] = (
        "Teach a classifier from labelled pictures which are good; prompt tuning learns from its judgement."
    )
    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("validation.prompts", "data.enable_bucket"), "which draws no pictures"),
        "validation.holdout": "which holds out what method.test_labels or method.holdout_per_class says",
        "data.alpha_mask": "which sees whole pictures",
        "data.cache_dir": "which sees pictures, not latents",
        "train.gradient_checkpointing": "whose ConvNeXt has none",
        **dict.fromkeys(("train.snr_gamma", "train.noise_offset"), "which knows no noise"),
    }
    no_plan: ClassVar[str | None] = (
        "loads no Stable Diffusion; a ConvNeXt-Tiny of 28 million parameters takes 0.4 GiB with AdamW, and about "
        "0.3 GiB for each picture of 384 pixels in train.train_batch_size"
    )
    helper_of: ClassVar[str | None] = "prompt_tuning"

    figures: ClassVar[tuple[str, ...]] = ("holdout_loss", "accuracy")
    artifacts: ClassVar[tuple[str, ...]] = ("classifier",)

    name: Literal["discriminator"] = "discriminator"
    classes: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=2,
        max_length=MOST_CLASSES,
        description="names of the classes, from number 0 on: [other, good]",
    )
    labels: Annotated[str | None, PathField("file")] = Field(
        None,
        description="JSON {file name: class number}, as `dreamfleet data label` writes it; when left out dataset.json "
        "in the folder of pictures, else subfolders 0, 1, ...",
    )
    test_labels: Annotated[str | None, PathField("file")] = Field(
        None,
        description="JSON of the pictures that are held out; when left out some are, by holdout_per_class",
    )
    holdout_per_class: int = Field(
        50,
        ge=0,
        description="pictures held out of each class, a fifth of them at most, to measure accuracy with",
    )
    convnext: Annotated[str | None, HUB_MODEL] = Field(
        None,
        description="classifier to start from: a folder, a hub name such as facebook/convnext-tiny-384-22k-1k, a .pth; "
        "when left out random weights",
    )
    depths: list[Annotated[int, Field(ge=1, le=100)]] = Field(
        [3, 3, 9, 3], min_length=1, max_length=6, description="blocks of each stage, of random weights"
    )
    hidden_sizes: list[Annotated[int, Field(ge=4, le=4096)]] = Field(
        [96, 192, 384, 768],
        min_length=1,
        max_length=6,
        description="channels of each stage, of random weights",
    )
    drop_path: float = Field(
        0.5, ge=0, lt=1, description="chance of the last block to be passed by; earlier less"
    )
    input_size: int = Field(
        INPUT_SIZE, ge=8, le=2048, description="pixels of a side that it sees pictures at, whole, as a square"
    )
    color_jitter: float = Field(
        0.2, ge=0, lt=1, description="brightness, contrast and saturation vary by up to this share"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of the truth given to all classes alike"
    )
    balance_classes: bool = Field(False, description="weigh rare classes up, so that all count alike")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes: {self.classes} holds a name twice")
        if len(self.depths) != len(self.hidden_sizes):
            raise ValueError("depths and hidden_sizes: give one number of each a stage")
        smallest = 4 * 2 ** (len(self.depths) - 1)
        if self.input_size < smallest:
            raise ValueError(
                f"input_size {self.input_size}: this many stages need {smallest} pixels at least"
            )
        return self
