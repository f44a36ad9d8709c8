"""One row per subject of a fleet, as its table and its page show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dreamfleet.trainers.config.metrics import metrics_by_figure

Status = Literal["waiting", "running", "interrupted", "failed", "completed"]


@dataclass(frozen=True)
class SubjectImages:
    """The images of a subject: the prompt and seed of its first preview, and paths; None for images it has not.

    ``base``, ``tuned``, ``real``: the full preview grids of the untuned and the tuned model, and the training images.
    ``thumbnail``: a strip of squares of equal size with one image of each that exists, in this order.
    """

    prompt: str = ""
    seed: int | None = None
    base: str | None = None
    tuned: str | None = None
    real: str | None = None
    thumbnail: str | None = None

    @property
    def roles(self) -> list[str]:
        """The names of the images that exist, in the order of the thumbnail."""
        return [role for role in ("base", "tuned", "real") if getattr(self, role)]


@dataclass(frozen=True)
class SubjectRow:
    """The state and the results of one subject.

    All paths are relative to the fleet's ``output_dir``, so that they stay valid in a copy. ``row``: its number in the
    table of subjects. ``prompt``, ``priority``, ``values``: from that table; ``values`` are recipe keys. ``reason``:
    why the subject failed. ``scores``: see :func:`scores_of`. ``artifacts``: files in ``exports/``. ``run_folder``,
    ``report``: None if there are none.
    """

    name: str
    row: int = 0
    status: Status = "waiting"
    reason: str | None = None
    steps: int = 0
    seconds: float = 0.0
    scores: Mapping[str, float] = field(default_factory=dict)
    artifacts: Sequence[str] = ()
    run_folder: str | None = None
    report: str | None = None
    images: SubjectImages | None = None
    prompt: str = ""
    priority: float = 0.0
    values: Mapping[str, Any] = field(default_factory=dict)


def scores_of(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores among the ``figures`` of a run's summary: its metrics, without loss, speed and memory."""
    metrics = metrics_by_figure()
    return {
        name: float(value)
        for name, value in figures.items()
        if (name in metrics or name.startswith("accuracy")) and isinstance(value, int | float)
    }
