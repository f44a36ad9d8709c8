"""The ``tracking:`` section of a recipe, and the registry of trackers that ``report_to`` names."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from dreamfleet.datasets.config_base import Section
from dreamfleet.datasets.path_field import PathField
from dreamfleet.datasets.registry import Registry


class TrackingConfig(Section):
    """The ``tracking:`` section: under which names the trackers of ``report_to`` store a run."""

    project: str | None = Field(
        None,
        min_length=1,
        description="W&B project and MLflow experiment; default: WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME, or dreamfleet",
    )
    group: str | None = Field(
        None, min_length=1, description="group of runs; searches and fleets set it to their own name"
    )
    folder: Annotated[str | None, PathField("folder", must_exist=False, is_output=True)] = Field(
        None,
        description="folder for what trackers store without a server; default: the folder beside the run's",
    )

    def of_group(self, output_dir: str) -> TrackingConfig:
        """Return the section of the runs of a search or fleet in ``output_dir``: one group and one folder for all."""
        parent, _, name = output_dir.rstrip("/").rpartition("/")
        return self.model_copy(update={"group": self.group or name, "folder": self.folder or parent})


#: Tracker classes by name; an installed package adds one through the entry-point group ``dreamfleet.trackers``.
TRACKERS: Registry[Any] = Registry(
    "tracker",
    group="dreamfleet.trackers",
    builtin={
        "tensorboard": "dreamfleet.trainers.tracking.tensorboard:TensorBoard",
        "mlflow": "dreamfleet.trainers.tracking.mlflow_tracker:MLflow",
        "wandb": "dreamfleet.trainers.tracking.wandb_tracker:WeightsAndBiases",
    },
)
