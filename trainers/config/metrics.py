"""The registry of metrics, with the names that recipes, files and reports use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dreamfleet.datasets.registry import Registry

HELD_OUT = "holdout_loss"
# Input of a metric -> the recipe key that provides it. `real` and `clip` have defaults: the training images and the
# pocket model's CLIP.
NEEDS = {
    "holdout": "validation.holdout, a folder of images kept out of training",
    "real": "validation.holdout or the training images",
    "prompts": "validation.prompts",
    "clip": "validation.clip, a CLIP folder (default: the pocket model's CLIP)",
    "dino": "validation.dino, the folder of a DINO ViT",
    "training": "the training images",
    "base": "the untuned model's images of the same prompts and seeds, which a run generates before the first step",
    "class_images": "data.class_prompt, from which the tuned and the untuned model generate images",
}


@dataclass(frozen=True)
class Figure:
    """A number that a metric logs besides its own, such as a term of a score; presented like a metric."""

    title: str
    note: str
    higher_is_better: bool = True


@dataclass(frozen=True)
class Metric:
    """One metric: its presentation, its inputs and its computation. Importing it does not import torch.

    ``title`` and ``note`` (one sentence) are for reports and documentation. ``needs`` are keys of :data:`NEEDS`
    without which the metric is not computed; ``uses`` are keys of inputs that it uses where they are given.

    ``compute`` maps :class:`~dreamfleet.trainers.evaluation.fidelity.ScoredImages` to one float per image; the metric
    is their mean. With ``parts``, it maps them to one float per image for the metric's name and for each part.

    ``measure`` is for metrics of the model instead of images: it maps a
    :class:`~dreamfleet.trainers.evaluation.loss_metrics.MeasuredRun`, before the first step, to an object whose
    ``figures(engine)`` returns the metric and its parts by name in every validation round, the same on every rank.
    Either may be a generator of passes (:mod:`dreamfleet.trainers.engines.passes`), which packed trainings share.

    Both are functions, or ``"module:attribute"`` to import them at their first use. A metric has at most one of
    them; with neither, the training loop measures it, such as the held-out loss.

    ``figure`` is the key in ``metrics.jsonl`` and ``summary.json`` if it differs from the metric's name.
    ``parts`` are the figures that are logged besides the metric, by their keys.
    """

    title: str
    note: str
    compute: Callable[[Any], Any] | str | None = None
    higher_is_better: bool = True
    needs: tuple[str, ...] = ()
    figure: str | None = None
    uses: tuple[str, ...] = ()
    parts: Mapping[str, Figure] = field(default_factory=dict)
    measure: Callable[[Any], Any] | str | None = None

    def __post_init__(self) -> None:
        if unknown := sorted({*self.needs, *self.uses} - NEEDS.keys()):
            raise ValueError(f"metric {self.title!r} needs {unknown}; known: {', '.join(NEEDS)}")
        if self.compute is not None and self.measure is not None:
            raise ValueError(f"metric {self.title!r} has both compute and measure; give one of them")


LOSS = Metric(
    "held-out loss",
    "The same noise and timesteps each time, on images that are not trained on.",
    None,
    higher_is_better=False,
    needs=("holdout",),
    figure=HELD_OUT,
)
CLIP_I = Metric(
    "CLIP-I",
    "How alike the previews are to real images of the subject; higher is more alike.",
    "dreamfleet.trainers.evaluation.fidelity:clip_i",
    needs=("real", "clip"),
)
CLIP_T = Metric(
    "CLIP-T",
    "How well the previews show what their prompts ask for; higher is closer.",
    "dreamfleet.trainers.evaluation.fidelity:clip_t",
    needs=("prompts", "clip"),
)
DINO = Metric(
    "DINO",
    "How alike the previews are to real images, with more weight on this very subject.",
    "dreamfleet.trainers.evaluation.fidelity:dino",
    needs=("real", "dino"),
)

FIDELITY = Metric(
    "fidelity",
    "Likeness to the subject, minus penalties for ignored prompts, copied training images and a changed class; 0 is "
    "the untuned model, 1 as alike as real images.",
    "dreamfleet.trainers.evaluation.fidelity_score:fidelity",
    needs=("real", "prompts", "clip", "training", "base"),
    uses=("dino", "class_images"),
    parts={
        "fidelity_subject": Figure(
            "subject likeness",
            "CLIP-I and, where given, DINO, from the untuned model's (0) to that of real images (1).",
        ),
        "fidelity_prompt": Figure(
            "prompt penalty", "0 while previews follow their prompts; 1.5 if they ignore them.", False
        ),
        "fidelity_copy": Figure(
            "copy penalty", "0 while previews are new images; 1 if all are copies of training images.", False
        ),
        "fidelity_class": Figure(
            "class penalty", "0 while the class is unchanged; 0.5 if it became the subject.", False
        ),
    },
)
OVERFITTING = Metric(
    "overfitting",
    "How far the loss on the training images fell below the untuned model's, 0 to 1; the same noise each time.",
    measure="dreamfleet.trainers.evaluation.loss_metrics:make_overfitting",
    higher_is_better=False,
    needs=("training",),
)
VIEW_LOSS = Metric(
    "view loss",
    "Loss on enlarged training images relative to the untuned model's; rises when the images are memorised.",
    measure="dreamfleet.trainers.evaluation.loss_metrics:make_view_loss",
    higher_is_better=False,
    needs=("training",),
)

METRICS: Registry[Metric] = Registry(
    "metric",
    group="dreamfleet.metrics",
    builtin={
        "loss": f"{__name__}:LOSS",
        "clip_i": f"{__name__}:CLIP_I",
        "clip_t": f"{__name__}:CLIP_T",
        "dino": f"{__name__}:DINO",
        "fidelity": f"{__name__}:FIDELITY",
        "overfitting": f"{__name__}:OVERFITTING",
        "view_loss": f"{__name__}:VIEW_LOSS",
    },
)


def image_metrics() -> dict[str, Metric]:
    """Return the metrics that are computed from images, by name."""
    return {name: metric for name, metric in METRICS.items() if metric.compute is not None}


def model_metrics() -> dict[str, Metric]:
    """Return the metrics that are measured on the model in validation rounds, by name."""
    return {name: metric for name, metric in METRICS.items() if metric.measure is not None}


def figures_of(name: str) -> list[str]:
    """Return the keys in ``metrics.jsonl`` of a metric and its parts."""
    metric = METRICS.get(name)
    return [metric.figure or name, *metric.parts]


def metrics_by_figure() -> dict[str, Metric | Figure]:
    """Return all metrics and their parts by their keys in ``metrics.jsonl``."""
    found: dict[str, Metric | Figure] = {}
    for name, metric in METRICS.items():
        found |= {metric.figure or name: metric, **metric.parts}
    return found


def metric_of(figure: str) -> str | None:
    """Return the name of the metric that logs a key of ``metrics.jsonl``, None if none does."""
    return next((name for name in METRICS.names() if figure in figures_of(name)), None)


def is_higher_better(figure: str) -> bool:
    """Return whether higher values of a key in ``metrics.jsonl`` are better; True for a method's own, as accuracies."""
    metric = metrics_by_figure().get(figure)
    return metric.higher_is_better if metric else True


def figure_title(figure: str) -> str:
    """Return the title of a key in ``metrics.jsonl``; the key itself if no metric is registered for it."""
    metric = metrics_by_figure().get(figure)
    return metric.title if metric else figure
