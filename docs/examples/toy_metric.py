"""A metric from outside the package: the mean brightness of the generated images."""

from __future__ import annotations

import numpy as np

from dreamfleet.trainers.config.metrics import METRICS, Metric
from dreamfleet.trainers.evaluation.fidelity import ScoredImages


def brightness(scored: ScoredImages) -> list[float]:
    """Return one number per image: the mean of its grey values, 0 (black) to 1 (white)."""
    return [float(np.asarray(image.convert("L")).mean() / 255) for image in scored.images]


# A search minimises a metric with ``higher_is_better=False``. ``needs`` can list real, prompts, clip, dino, base, ...
BRIGHTNESS = Metric(
    title="brightness",
    note="Mean grey value of the previews; lower is darker.",
    compute=brightness,
    higher_is_better=False,
)


if __name__ == "__main__":  # in a script or a notebook; an installed package uses an entry point instead
    METRICS.register("brightness")(BRIGHTNESS)
