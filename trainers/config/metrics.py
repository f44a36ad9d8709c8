"""The registry of metrics, with the names that recipes, files and reports use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
}


@dataclass(frozen=True)
class Metric:
    """One metric: its presentation, its inputs and its computation. Importing it does not import torch.

    ``title`` and ``note`` (one sentence) are for reports and documentation. ``needs`` are keys of :data:`NEEDS`.

    ``compute`` maps :class:`~dreamfleet.trainers.evaluation.fidelity.ScoredImages` to one float per image; the metric
    is their mean. It is a function, or ``"module:attribute"`` to import it at its first use. None means that the
    training loop measures the metric, such as the held-out loss.

    ``figure`` is the key in ``metrics.jsonl`` and ``summary.json`` if it differs from the metric's name.
    """

    title: str
    note: str
    compute: Callable[[Any], Any] | str | None
    higher_is_better: bool = True
    needs: tuple[str, ...] = ()
    figure: str | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.needs) - NEEDS.keys()):
            raise ValueError(f"metric {self.title!r} needs {unknown}; known: {', '.join(NEEDS)}")


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

METRICS: Registry[Metric] = Registry(
    "metric",
    group="dreamfleet.metrics",
    builtin={
        "loss": f"{__name__}:LOSS",
        "clip_i": f"{__name__}:CLIP_I",
        "clip_t": f"{__name__}:CLIP_T",
        "dino": f"{__name__}:DINO",
    },
)


def image_metrics() -> dict[str, Metric]:
    """Return the metrics that are computed from images, by name."""
    return {name: metric for name, metric in METRICS.items() if metric.compute is not None}


def metrics_by_figure() -> dict[str, Metric]:
    """Return all metrics by their keys in ``metrics.jsonl``."""
    return {metric.figure or name: metric for name, metric in METRICS.items()}


def is_higher_better(figure: str) -> bool:
    """Return whether higher values of a key in ``metrics.jsonl`` are better; True for a method's own, as accuracies."""
    metric = metrics_by_figure().get(figure)
    return metric.higher_is_better if metric else True


def figure_title(figure: str) -> str:
    """Return the title of a key in ``metrics.jsonl``; the key itself if no metric is registered for it."""
    metric = metrics_by_figure().get(figure)
    return metric.title if metric else figure
