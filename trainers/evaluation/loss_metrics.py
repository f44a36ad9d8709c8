"""Metrics of the model from the training images alone: losses relative to those of the untuned model.

They need no held-out images. Each bin is one of ``BINS`` evenly spaced timesteps; noise and timesteps are the same in
every measurement, so that a difference is a difference of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.registry import load_attribute
from dreamfleet.trainers.config.metrics import METRICS
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.engines.base import Engine
from dreamfleet.trainers.engines.passes import Passes, finish
from dreamfleet.trainers.evaluation.fixed_losses import FixedLosses
from dreamfleet.trainers.methods.base import Method
from dreamfleet.trainers.methods.diffusion_method import require_diffusion

BINS = 10  # as in Adaptive Personalized Training
MOST_IMAGES = 16  # maximum number of training images that are measured, evenly chosen
VIEWS = (
    1.1,
    1.25,
)  # factors by which the views are enlarged; chosen on the shipped cat, see docs/measurements.md


@dataclass(frozen=True)
class MeasuredRun:
    """What a metric of the model can use: the method, its engine, and the training images.

    ``key``: the recipe key that asks for the metric, for errors.
    """

    method: Method
    engine: Engine
    data: DataConfig
    training: Index
    distributed: DistributedContext
    key: str = "validation.metrics"

    def losses(self, *, enlarged: float = 1.0) -> FixedLosses:
        """Return the losses of up to ``MOST_IMAGES`` training images in ``BINS`` bins.

        Raises RecipeError if the method does not train a diffusion model.
        """
        num = len(self.training)
        rows = sorted({number * num // min(num, MOST_IMAGES) for number in range(min(num, MOST_IMAGES))})
        captions = self.training.column("caption")
        return FixedLosses(
            self.training.take(rows, [captions[row] for row in rows]),
            method=require_diffusion(self.method, self.key),
            data=self.data,
            count=BINS,
            enlarged=enlarged,
            distributed=self.distributed,
        )


class ModelMetric(Protocol):
    """A metric of the model: created before the first step, with the untuned model in place."""

    def figures(self, engine: Engine) -> dict[str, float] | Passes[dict[str, float]]:
        """Return the metric and its parts by their keys in ``metrics.jsonl``; the same on every rank.

        It may be a generator of passes, which are then computed together with those of other trainings.
        """
        ...


class Overfitting:
    """How far the losses on the training images fell below the untuned model's: 0 for untuned, 1 for memorised.

    overfitting = mean over bins b of clip(1 - L_b / L0_b, 0, 1), where L_b is the mean loss of the training images in
    bin b, and L0_b that of the untuned model. It is the indicator of Adaptive Personalized Training (arXiv 2507.02687),
    1 - exp(-T (L0_b - L_b)) of moving averages, with two changes: losses at fixed noise need no averages over steps,
    and a ratio needs no temperature T.
    """

    def __init__(self, images: FixedLosses, base: Tensor):
        self.images, self.base = images, base

    def figures(self, engine: Engine) -> Passes[dict[str, float]]:
        """Return the indicator as ``overfitting``."""
        losses = yield from self.images.passes(engine)
        return {"overfitting": float((1 - relative(losses, self.base)).clamp(0, 1).mean())}


def make_overfitting(run: MeasuredRun) -> Passes[Overfitting]:
    """Create the metric from the losses of the untuned model."""
    images = run.losses()
    return Overfitting(images, (yield from run.engine.evaluate_passes(images.passes(run.engine))))


class ViewLoss:
    """The loss on views of the training images that are never trained on, relative to the untuned model's.

    view_loss = mean over views v and bins b of L_vb / L0_vb, where L_vb is the mean loss of the training images in
    view v and bin b. The views are the images enlarged around their centre by the factors ``VIEWS``, which no
    augmentation of the training makes. What a model learns about the subject lowers the loss; what it memorises of the
    exact images raises it, as for held-out images.
    """

    def __init__(self, views: Sequence[FixedLosses], bases: Sequence[Tensor]):
        self.views, self.bases = views, bases

    def figures(self, engine: Engine) -> Passes[dict[str, float]]:
        """Return the relative loss as ``view_loss``."""
        losses = yield from _losses_of(self.views, engine)
        ratios = [relative(one, base).mean() for one, base in zip(losses, self.bases, strict=True)]
        return {"view_loss": float(sum(ratios) / len(ratios))}


def make_view_loss(run: MeasuredRun) -> Passes[ViewLoss]:
    """Create the metric from the losses of the untuned model."""
    views = [run.losses(enlarged=factor) for factor in VIEWS]
    return ViewLoss(views, (yield from run.engine.evaluate_passes(_losses_of(views, run.engine))))


def _losses_of(views: Sequence[FixedLosses], engine: Engine) -> Passes[list[Tensor]]:
    """Return the losses ``[N, bins]`` of each view."""
    found = []
    for view in views:
        found.append((yield from view.passes(engine)))
    return found


def relative(losses: Tensor, base: Tensor) -> Tensor:
    """Return the mean loss of each bin ``[bins]`` relative to the base's, given the losses ``[N, bins]`` of both."""
    return losses.mean(dim=0) / base.mean(dim=0)


def make_model_metrics(names: list[str], run: MeasuredRun) -> Passes[list[ModelMetric]]:
    """Create the metrics of these names, which may take passes; every rank calls it, before the first step.

    Raises RecipeError if the method does not train a diffusion model and a metric needs one.
    """
    found: list[ModelMetric] = []
    for name in names:
        measure = METRICS.get(name).measure
        if isinstance(measure, str):
            measure = load_attribute(measure, what=f"metric {name!r}")
        assert measure is not None
        found.append((yield from finish(measure(run))))
    return found
