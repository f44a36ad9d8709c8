"""The ``validation:`` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field

from dreamfleet.datasets.config_base import Section, as_list
from dreamfleet.datasets.path_field import PathField
from dreamfleet.datasets.registry import EntryName
from dreamfleet.trainers.config.metrics import (
    HELD_OUT,
    METRICS,
    figures_of,
    image_metrics,
    is_higher_better,
    model_metrics,
)


class ValidationConfig(Section):
    """The ``validation:`` section: held-out images, preview images and metrics."""

    prompts: Annotated[list[str], BeforeValidator(as_list)] = Field(
        [],
        validation_alias=AliasChoices("prompts", "validation_prompts", "validation_prompt", "sample_prompts"),
        description="prompts of the preview images, in the webui's syntax, or the name of a .txt file with one prompt "
        "per "
        "line; with kohya's options: a cat --n blurry --w 512 --h 768 --d 3 --s 30 --l 7 --ss euler_a",
    )
    plain_prompts: bool = Field(False, description="prompts are literal text, without the webui's syntax")
    negative_prompt: str = Field("", description="negative prompt of the previews")
    steps: int = Field(
        100,
        ge=1,
        validation_alias=AliasChoices("steps", "validation_steps", "sample_every_n_steps"),
        description="optimizer steps between validation rounds",
    )
    sample_at_first: bool = Field(
        True, description="also generate previews before the first step, with the untrained model"
    )
    num_images: int = Field(
        4,
        ge=1,
        validation_alias=AliasChoices("num_images", "num_validation_images"),
        description="previews per prompt",
    )
    num_inference_steps: int = Field(25, ge=1, description="sampler steps of the previews")
    guidance_scale: float = Field(7.5, ge=1, description="guidance scale of the previews")
    scheduler: Literal["ddim", "euler_a", "dpm++"] = Field("ddim", description="sampler of the previews")
    seed: int = Field(
        0,
        ge=0,
        validation_alias=AliasChoices("seed", "validation_seed"),
        description="seed of each prompt's first preview; the others use the following numbers",
    )
    holdout: Annotated[str | None, PathField("images", compared=False)] = Field(
        None, description="folder of images that are not trained on"
    )
    holdout_timesteps: int = Field(8, ge=1, description="timesteps per held-out image, evenly spaced")
    metrics: list[Annotated[str, AfterValidator(EntryName(METRICS))]] = Field(
        ["loss"], description="what is measured: [metrics](#metrics)"
    )
    metric_for_best: str = Field(
        HELD_OUT,
        validation_alias=AliasChoices("metric_for_best", "metric_for_best_model"),
        description="figure that decides which checkpoint is the best, which is kept in addition to the newest ones; a "
        "search sets it to its first metric",
    )
    greater_is_better: bool | None = Field(
        None, description="whether higher values of metric_for_best are better; default: true for scores"
    )
    resources: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None,
        description="Ray resources, such as {CPU: 4} or {GPU: 1}, of a process of its own that computes the rounds "
        "from checkpoints while the training continues; default: the workers compute them between two steps",
    )
    clip: Annotated[str | None, PathField("model")] = Field(
        None, description="CLIP folder for clip_i, clip_t and fidelity; default: the pocket model's CLIP"
    )
    dino: Annotated[str | None, PathField("model")] = Field(
        None, description="folder of a DINO ViT for the dino metric; fidelity uses it too"
    )

    @property
    def maximises(self) -> bool:
        """Whether higher values of ``metric_for_best`` are better."""
        given = self.greater_is_better
        return is_higher_better(self.metric_for_best) if given is None else given

    @property
    def preview_metrics(self) -> list[str]:
        """The metrics that are computed from previews, in the registry's order; none without prompts."""
        return [name for name in image_metrics() if self.prompts and name in self.metrics]

    @property
    def model_metrics(self) -> list[str]:
        """The metrics that are measured on the model, in the registry's order."""
        return [name for name in model_metrics() if name in self.metrics]

    @property
    def figures(self) -> list[str]:
        """The keys in ``metrics.jsonl`` of the model's and the previews' metrics, with their parts."""
        return [
            figure for name in (*self.model_metrics, *self.preview_metrics) for figure in figures_of(name)
        ]

    def uses(self, need: str, *, by: str | None = None) -> bool:
        """Return whether a metric of the previews, or the one named ``by``, uses an input of ``metrics.NEEDS``."""
        names = self.preview_metrics if by is None else [by]
        return any(need in (*METRICS.get(name).needs, *METRICS.get(name).uses) for name in names)
