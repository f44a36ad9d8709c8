"""One row per subject of a fleet, as its table and its page show it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dreamfleet.datasets.storage.storage import Storage

TABLE = "fleet.parquet"
Status = Literal["waiting", "running", "interrupted", "failed", "completed"]


@dataclass(frozen=True)
class SubjectRow:
    """The state and the results of one subject; a changed subject is a new row.

    All paths are relative to the fleet's ``output_dir``, so that they stay valid in a copy. ``reason``: why the subject
    failed. ``scores``: the keys and values of ``figures`` in ``summary.json``. ``artifacts``: files in ``exports/``.
    ``run_folder``, ``report``: None if there are none. ``images``: see
    :func:`dreamfleet.tune.fleet.thumbnails.write_thumbnail`.
    """

    name: str
    status: Status = "waiting"
    reason: str | None = None
    steps: int = 0
    seconds: float = 0.0
    scores: Mapping[str, float] = field(default_factory=dict)
    artifacts: Sequence[str] = ()
    run_folder: str | None = None
    report: str | None = None
    images: SubjectImages | None = None


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


def score_names(rows: Sequence[SubjectRow]) -> list[str]:
    """Return the keys of all scores in the order in which they appear first."""
    return list(dict.fromkeys(name for row in rows for name in row.scores))


def fleet_table(rows: Sequence[SubjectRow]) -> Any:
    """Return the rows as a pyarrow table: one column for each field and each score, in the order of the page."""
    import pyarrow as pa

    def text(values: Sequence[str | None]) -> Any:
        return pa.array(values, pa.string())

    images = [row.images or SubjectImages() for row in rows]
    columns = {
        "name": text([row.name for row in rows]),
        "status": text([row.status for row in rows]),
        "reason": text([row.reason for row in rows]),
        "steps": pa.array([row.steps for row in rows], pa.int64()),
        "seconds": pa.array([row.seconds for row in rows], pa.float64()),
        "artifacts": pa.array([list(row.artifacts) for row in rows], pa.list_(pa.string())),
        "run_folder": text([row.run_folder for row in rows]),
        "report": text([row.report for row in rows]),
        "prompt": text([found.prompt or None for found in images]),
        "seed": pa.array([found.seed for found in images], pa.int64()),
        "base_image": text([found.base for found in images]),
        "tuned_image": text([found.tuned for found in images]),
        "real_image": text([found.real for found in images]),
        "thumbnail": text([found.thumbnail for found in images]),
    }
    for name in score_names(rows):
        # A metric may have any name: one that is also the name of a field gets a prefix.
        columns[f"score_{name}" if name in columns else name] = pa.array(
            [row.scores.get(name) for row in rows], pa.float64()
        )
    return pa.table(columns)


def write_fleet_table(folder: Storage, rows: Sequence[SubjectRow]) -> None:
    """Write ``fleet.parquet`` into the folder of a fleet."""
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(fleet_table(rows), buffer)
    folder.write_bytes(TABLE, buffer.getvalue())
