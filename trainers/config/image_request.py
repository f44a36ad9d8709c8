"""The request for one image: prompt, seed and sampling options, as all commands and runs pass it to the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.config.samplers import plain_sampler


@dataclass(frozen=True)
class ImageRequest:
    """One image to generate. Raises UserError for a sampler that does not exist and for fewer than one step.

    ``prompt`` and ``negative_prompt`` are in the webui's syntax (``docs/prompts.md``), or literal if ``plain``.
    ``seed`` is the seed of the initial noise. ``width`` and ``height`` are in pixels; None means the model's own size.
    With a ``guidance_scale`` of 1 the negative prompt is not used, which halves the computation.
    """

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 25
    guidance_scale: float = 7.5
    scheduler: str = "ddim"
    width: int | None = None
    height: int | None = None
    plain: bool = False

    def __post_init__(self) -> None:
        plain_sampler(self.scheduler)
        if self.steps < 1:
            raise UserError(f"steps {self.steps}: an image needs at least 1 denoising step")

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """The options that all images of one batch share."""
        return self.steps, self.guidance_scale, self.scheduler, self.width, self.height, self.plain

    def columns(self, count: int) -> list[ImageRequest]:
        """Return ``count`` requests of the same prompt with ascending seeds."""
        return [replace(self, seed=self.seed + number) for number in range(count)]


def requests_for(prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> list[ImageRequest]:
    """Return a request for each prompt and its seed, with the same options."""
    return [ImageRequest(prompt, seed=seed, **options) for prompt, seed in zip(prompts, seeds, strict=True)]
