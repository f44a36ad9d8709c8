"""The ``method:`` section of the discriminator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dreamfleet.datasets.config import MOST_CLASSES
from dreamfleet.datasets.path_field import PathField
from dreamfleet.trainers.config.method import MethodConfig, SearchSpace
from dreamfleet.trainers.config.model import HUB_MODEL
from dreamfleet.trainers.config.train import DENOISING_KEYS

INPUT_SIZE = 384  # default side of the input in pixels, if a file does not specify it


class DiscriminatorConfig(MethodConfig):
    """The options of the discriminator."""

    implementation: ClassVar[str] = "dreamfleet.trainers.methods.discriminator:DiscriminatorTraining"
    summary: ClassVar[str] = (
        "Trains a ConvNeXt image classifier on labelled images; prompt tuning can use it as a loss."
    )
    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("validation.prompts", "data.enable_bucket"), "which generates no images"),
        "validation.holdout": "which holds out images by method.test_labels or method.holdout_per_class",
        "data.alpha_mask": "which trains on whole images",
        "data.cache_dir": "which trains on images, not latents",
        "train.gradient_checkpointing": "whose ConvNeXt does not support it",
        **dict.fromkeys(DENOISING_KEYS, "which adds no noise"),
    }
    not_searched: ClassVar[Mapping[str, str]] = {
        "holdout_per_class": "trials that are measured differently cannot be compared"
    }
    no_plan: ClassVar[str | None] = (
        "loads no Stable Diffusion; a ConvNeXt-Tiny of 28 million parameters takes 0.4 GiB with AdamW, and about "
        "0.3 GiB for each image of 384 pixels in train.train_batch_size"
    )
    helper_of: ClassVar[str | None] = "prompt_tuning"

    figures: ClassVar[tuple[str, ...]] = ("holdout_loss", "accuracy")
    artifacts: ClassVar[tuple[str, ...]] = ("classifier",)
    search_spaces: ClassVar[Mapping[str, SearchSpace]] = {
        "discriminator": {
            "optimizer.learning_rate": {"distribution": "loguniform", "lower": 1e-5, "upper": 5e-3},
            "method.drop_path": {"distribution": "uniform", "lower": 0.0, "upper": 0.5},
            "method.label_smoothing": {"distribution": "choice", "values": [0.0, 0.1]},
        },
    }

    name: Literal["discriminator"] = "discriminator"
    classes: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=2,
        max_length=MOST_CLASSES,
        description="names of the classes, in the order of their numbers from 0: [other, good]",
    )
    labels: Annotated[str | None, PathField("file")] = Field(
        None,
        description="JSON file {file name: class number}, as `dreamfleet data label` writes it; default: dataset.json "
        "in "
        "the image folder, else subfolders 0, 1, ...",
    )
    test_labels: Annotated[str | None, PathField("file")] = Field(
        None,
        description="JSON file of the images that are held out; default: some are chosen, see holdout_per_class",
    )
    holdout_per_class: int = Field(
        50,
        ge=0,
        description="images held out of each class to measure accuracy, at most a fifth of the class",
    )
    convnext: Annotated[str | None, HUB_MODEL] = Field(
        None,
        description="classifier to start from: a folder, a hub name such as facebook/convnext-tiny-384-22k-1k or a "
        ".pth "
        "file; default: random weights",
    )
    depths: list[Annotated[int, Field(ge=1, le=100)]] = Field(
        [3, 3, 9, 3], min_length=1, max_length=6, description="blocks of each stage, for random weights"
    )
    hidden_sizes: list[Annotated[int, Field(ge=4, le=4096)]] = Field(
        [96, 192, 384, 768],
        min_length=1,
        max_length=6,
        description="channels of each stage, for random weights",
    )
    drop_path: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="stochastic depth: probability of skipping the last block; smaller for earlier blocks",
    )
    input_size: int = Field(
        INPUT_SIZE, ge=8, le=2048, description="pixels of a side; whole images are resized to this square"
    )
    color_jitter: float = Field(
        0.2, ge=0, lt=1, description="brightness, contrast and saturation vary by up to this fraction"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="probability spread evenly over all classes in the target"
    )
    balance_classes: bool = Field(False, description="weight the loss so that all classes count equally")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes: {self.classes} contains a name twice")
        if len(self.depths) != len(self.hidden_sizes):
            raise ValueError("depths and hidden_sizes: give one number of each per stage")
        smallest = 4 * 2 ** (len(self.depths) - 1)
        if self.input_size < smallest:
            raise ValueError(
                f"input_size {self.input_size}: {len(self.depths)} stages need at least {smallest} pixels"
            )
        return self
