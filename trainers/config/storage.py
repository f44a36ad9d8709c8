"""The ``storage:`` section of a recipe."""

from __future__ import annotations

from pydantic import Field

from dreamfleet.datasets.config_base import Section


class StorageConfig(Section):
    """The ``storage:`` section: what a run does while its bucket cannot be reached."""

    patience: float = Field(
        15.0,
        ge=0,
        description="minutes that a run waits for a bucket that does not answer or reports errors of its own; training "
        "continues meanwhile, and checkpoints wait on the worker's disk",
    )

    @property
    def patience_seconds(self) -> float:
        """``patience`` in seconds."""
        return 60 * self.patience
