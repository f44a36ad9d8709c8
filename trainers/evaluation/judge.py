"""Scores images by the registered metrics: any images, or the previews of a run in progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.registry import load_attribute
from dreamfleet.trainers.config.metrics import Metric, image_metrics
from dreamfleet.trainers.config.validation import ValidationConfig
from dreamfleet.trainers.evaluation.fidelity import ScoredImages, strip_words
from dreamfleet.trainers.models.sampling.prompt_syntax import plain_text
from dreamfleet.trainers.models.vision.clip import ClipScorer, load_clip
from dreamfleet.trainers.models.vision.dino import DinoScorer, load_dino


@dataclass(frozen=True)
class Scores:
    """The scores of images: ``means`` by metric, and in ``images`` the prompt and the scores of each image."""

    means: dict[str, float]
    images: list[dict[str, Any]]


def score_images(
    images: Sequence[Image.Image],
    *,
    metrics: Sequence[str] | None = None,
    prompts: Sequence[str] = (),
    real: Sequence[Image.Image] = (),
    clip: ClipScorer | None = None,
    dino: DinoScorer | None = None,
    strip: Sequence[str] | Mapping[str, str] = (),
) -> Scores:
    """Score N images against prompts (one for all, or N) and real images of the subject.

    ``metrics`` defaults to all metrics whose inputs are given. ``strip`` names words of the prompts that CLIP does not
    know. Raises UserError if there is nothing to compare the images with.
    """
    if not images:
        raise UserError("there are no images to score")
    if not prompts and not real:
        raise UserError("scores need real images of the subject (--real FOLDER), prompts (--prompt), or both")
    if len(prompts) not in (0, 1, len(images)):
        raise UserError(f"{len(images)} images need one prompt for all or one each, not {len(prompts)}")
    each = list(prompts) * (len(images) if len(prompts) == 1 else 1)
    given = {"prompts": each, "real": real, "clip": clip, "dino": dino}
    scored = ScoredImages(images, [strip_words(prompt, strip) for prompt in each], real, clip, dino)
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in each] or [{} for _ in images]
    means = {}
    for name, metric in image_metrics().items():
        if name in metrics if metrics is not None else all(given.get(need) for need in metric.needs):
            values = _compute(name, metric, scored)
            means[name] = float(values.mean())
            for row, value in zip(rows, values.tolist(), strict=True):
                row[name] = value
    return Scores(means, rows)


def _compute(name: str, metric: Metric, scored: ScoredImages) -> torch.Tensor:
    compute = metric.compute
    if isinstance(compute, str):
        compute = load_attribute(compute, what=f"metric {name!r}")
    assert compute is not None
    values = torch.as_tensor(compute(scored), dtype=torch.float32)
    if values.shape != (len(scored.images),):
        raise UserError(
            f"metric {name!r} returned values of shape {list(values.shape)} for {len(scored.images)} images; "
            "it must return one number per image"
        )
    return values


class Judge:
    """Scores previews during a run; loads the models that the recipe's metrics need once."""

    def __init__(self, config: ValidationConfig, *, real: list[Image.Image], strip: Mapping[str, str]):
        self.config, self.real, self.strip = config, real, strip
        self.metrics = config.preview_metrics
        needs = {need for name in self.metrics for need in image_metrics()[name].needs}
        self.clip = load_clip(config.clip) if "clip" in needs else None
        self.dino = load_dino(config.dino) if "dino" in needs and config.dino else None

    def score(self, images: list[Image.Image], cells: list[dict[str, Any]]) -> dict[str, float]:
        """Add the scores of each image to its cell and return their means."""
        prompts = [
            cell["prompt"] if self.config.plain_prompts else plain_text(cell["prompt"]) for cell in cells
        ]
        scores = score_images(
            images,
            metrics=self.metrics,
            prompts=prompts,
            real=self.real,
            clip=self.clip,
            dino=self.dino,
            strip=self.strip,
        )
        for cell, found in zip(cells, scores.images, strict=True):
            cell["scores"] = {name: round(found[name], 4) for name in self.metrics}
        return scores.means
