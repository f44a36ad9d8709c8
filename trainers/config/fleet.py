"""The ``fleet:`` section: how many subjects of a fleet are trained, and how long."""

from __future__ import annotations

from pydantic import Field

from dreamfleet.datasets.config_base import Section


class FleetConfig(Section):
    """The ``fleet:`` section: the limits of `dreamfleet fleet`, and what remains of a finished subject."""

    max_concurrent: int | None = Field(
        None, ge=1, description="subjects trained at once; default: as many as fit on the machines"
    )
    max_subjects: int | None = Field(
        None, ge=1, description="subjects that one command trains; `--resume` continues with the next ones"
    )
    max_hours: float | None = Field(
        None,
        gt=0,
        description="hours that one command trains; running subjects then save a checkpoint, and `--resume` continues "
        "them",
    )
    keep_checkpoints: bool = Field(
        False, description="keep the checkpoints of completed subjects; by default only their exports remain"
    )
