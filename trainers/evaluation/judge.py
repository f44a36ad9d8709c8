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
    """The scores of images: ``means`` by figure, and in ``images`` the prompt and the scores of each image."""

    means: dict[str, float]
    images: list[dict[str, Any]]


@dataclass(frozen=True)
class References:
    """The images that the previews of a run are compared with; the fields are those of ScoredImages."""

    real: Sequence[Image.Image] = ()
    masks: Sequence[Image.Image | None] = ()
    training: Sequence[Image.Image] = ()
    base: Sequence[Image.Image] = ()
    base_class_images: Sequence[Image.Image] = ()


def score_images(
    images: Sequence[Image.Image],
    *,
    metrics: Sequence[str] | None = None,
    prompts: Sequence[str] = (),
    real: Sequence[Image.Image] = (),
    clip: ClipScorer | None = None,
    dino: DinoScorer | None = None,
    strip: Sequence[str] | Mapping[str, str] = (),
    **others: Any,
) -> Scores:
    """Score N images against prompts (one for all, or N) and real images of the subject.

    ``metrics`` defaults to all metrics whose inputs are given. ``strip`` names words of the prompts that CLIP does not
    know. ``others``: further fields of :class:`~dreamfleet.trainers.evaluation.fidelity.ScoredImages`. Raises UserError
    if there is nothing to compare the images with.
    """
    if not images:
        raise UserError("there are no images to score")
    if not prompts and not real:
        raise UserError("scores need real images of the subject (--real FOLDER), prompts (--prompt), or both")
    if len(prompts) not in (0, 1, len(images)):
        raise UserError(f"{len(images)} images need one prompt for all or one each, not {len(prompts)}")
    each = list(prompts) * (len(images) if len(prompts) == 1 else 1)
    given = {"prompts": each, "real": real, "clip": clip, "dino": dino, **others}
    stripped = [strip_words(prompt, strip) for prompt in each]
    scored = ScoredImages(images, stripped, real, clip, dino, **others)
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in each] or [{} for _ in images]
    means = {}
    for name, metric in image_metrics().items():
        if name in metrics if metrics is not None else all(given.get(need) for need in metric.needs):
            for figure, values in _compute(name, metric, scored).items():
                means[figure] = float(values.mean())
                for row, value in zip(rows, values.tolist(), strict=True):
                    row[figure] = value
    return Scores(means, rows)


def _compute(name: str, metric: Metric, scored: ScoredImages) -> dict[str, torch.Tensor]:
    """Return the values ``[N]`` of a metric and of its parts, by figure."""
    compute = metric.compute
    if isinstance(compute, str):
        compute = load_attribute(compute, what=f"metric {name!r}")
    assert compute is not None
    found = compute(scored)
    found = found if metric.parts else {name: found}
    if not isinstance(found, Mapping) or found.keys() != {name, *metric.parts}:
        raise UserError(f"metric {name!r} must return values by name: {', '.join((name, *metric.parts))}")
    tensors = {part: torch.as_tensor(values, dtype=torch.float32) for part, values in found.items()}
    for part, values in tensors.items():
        if values.shape != (len(scored.images),):
            raise UserError(
                f"metric {part!r} returned values of shape {list(values.shape)} for {len(scored.images)} images; "
                "it must return one number per image"
            )
    return {metric.figure or name: tensors[name], **{part: tensors[part] for part in metric.parts}}


class Judge:
    """Scores previews during a run; loads the models that the recipe's metrics need once."""

    def __init__(self, config: ValidationConfig, *, references: References, strip: Mapping[str, str]):
        self.config, self.references, self.strip = config, references, strip
        self.metrics = config.preview_metrics
        self.clip = load_clip(config.clip) if config.uses("clip") else None
        self.dino = load_dino(config.dino) if config.uses("dino") and config.dino else None
        self._constant: dict[tuple[str, str], torch.Tensor] = {}

    def score(
        self,
        images: Sequence[Image.Image],
        cells: list[dict[str, Any]],
        *,
        class_images: Sequence[Image.Image] = (),
    ) -> dict[str, float]:
        """Add the scores of each image to its cell and return their means.

        ``class_images``: the current model's images of the class prompts, if a metric uses them.
        """
        prompts = [
            cell["prompt"] if self.config.plain_prompts else plain_text(cell["prompt"]) for cell in cells
        ]
        fixed = self.references
        scores = score_images(
            images,
            metrics=self.metrics,
            prompts=prompts,
            real=fixed.real,
            clip=self.clip,
            dino=self.dino,
            strip=self.strip,
            masks=fixed.masks,
            training=fixed.training,
            base=fixed.base,
            class_images=class_images,
            base_class_images=fixed.base_class_images,
            constant=self._constant,
        )
        for cell, found in zip(cells, scores.images, strict=True):
            cell["scores"] = {name: round(value, 4) for name, value in found.items() if name in scores.means}
        return scores.means
