"""The interface of trackers: programs outside the run folder that show a run's metrics and images."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from dreamfleet.datasets.environment import variable, variables_to_send
from dreamfleet.datasets.errors import RecipeError, StorageError
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.tracking import TRACKERS
from dreamfleet.trainers.recipe import Recipe

if TYPE_CHECKING:  # recipes load without PIL
    from PIL import Image

log = logging.getLogger(__name__)
IDS = "tracking.json"
PROJECT = "dreamfleet"


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told about a run: its folder and recipe, and the step that it continues from (0: it begins)."""

    folder: Storage
    recipe: Recipe
    start_step: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.recipe.run_name

    @property
    def parameters(self) -> dict[str, Any]:
        """The resolved recipe as one level: ``optimizer.learning_rate`` -> value; without keys that are not set."""
        return flatten(self.recipe.model_dump(mode="json", exclude_none=True), separator=".")

    def stored_id(self, tracker: str) -> str | None:
        """Return the ID that :meth:`store_id` stored for a tracker; None for a run that it does not know yet."""
        return self._ids().get(tracker)

    def store_id(self, tracker: str, run_id: str) -> None:
        """Store the ID under which a tracker knows the run in ``tracking.json``, for its next start."""
        self.folder.write_text(IDS, json_text({**self._ids(), tracker: run_id}, indent=1) + "\n")

    def _ids(self) -> dict[str, str]:
        try:
            found = json.loads(self.folder.read_text(IDS)) if self.folder.exists(IDS) else {}
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}


class Tracker:
    """Shows one run; created on rank 0 once per start of the run, which continues where the last one stored its ID.

    A subclass is registered under the name by which ``report_to`` selects it. Its module imports without the tracker's
    package. Metrics have the names of ``metrics.jsonl``. Errors after the creation never end a run.
    """

    #: The package to import, and the extra of dreamfleet that installs it; None if it is always installed.
    package: ClassVar[str | None] = None
    extra: ClassVar[str | None] = None
    #: Environment variables, secrets among them, that are sent to the worker of rank 0.
    variables: ClassVar[Sequence[str]] = ()

    def __init__(self, run: TrackedRun):
        self.run = run

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        """Raise RecipeError if a setting is missing, before anything starts."""

    @classmethod
    def environment(cls) -> dict[str, str]:
        """Return the variables to send to the worker. They contain secrets: never log the result."""
        return {name: value for name in cls.variables if (value := variable(name))}

    def log(self, line: Mapping[str, Any]) -> None:
        """Store a line of metrics; ``line["step"]`` is the number of finished optimizer steps."""
        raise NotImplementedError

    def log_image(self, tag: str, image: Image.Image, step: int) -> None:
        """Store an RGB image ``[H, W, 3]`` under ``tag``."""

    def flush(self) -> None:
        """Send everything so far; called after each save."""

    def close(self, results: Mapping[str, Any] | None) -> None:
        """End the session: ``results`` are those of ``summary.json``, None after an error."""


class Trackers:
    """The trackers of a run. An error of one is logged once, and the run continues without it."""

    def __init__(self, trackers: Mapping[str, Tracker] | None = None):
        self._open = dict(trackers or {})

    def log(self, line: Mapping[str, Any]) -> None:
        """Store a line of metrics in all trackers."""
        self._each("log", line)

    def log_image(self, tag: str, image: Image.Image, step: int) -> None:
        """Store an image in all trackers."""
        self._each("log_image", tag, image, step)

    def flush(self) -> None:
        """Have all trackers send everything so far."""
        self._each("flush")

    def close(self, results: Mapping[str, Any] | None) -> None:
        """End the sessions of all trackers."""
        self._each("close", results)
        self._open.clear()

    def _each(self, action: str, *arguments: Any) -> None:
        for name, tracker in list(self._open.items()):
            try:
                getattr(tracker, action)(*arguments)
            except StorageError:  # of the run folder itself
                raise
            except Exception as error:  # noqa: BLE001 - the errors of other projects share no class
                log.warning(
                    "report_to: %s failed (%s: %s); the run continues without it, and `metrics.jsonl` has everything",
                    name,
                    type(error).__name__,
                    str(error).partition("\n")[0][:300],
                )
                del self._open[name]


def open_trackers(run: TrackedRun) -> Trackers:
    """Create the trackers that ``report_to`` names, on rank 0.

    Raises RecipeError if one cannot start. A run that continues starts without it instead, with a warning.
    """
    found: dict[str, Tracker] = {}
    for name in run.recipe.report_to:
        try:
            found[name] = TRACKERS.get(name)(run)
        except StorageError:
            raise
        except Exception as error:
            reason = f"report_to: {name} cannot start ({type(error).__name__}: {str(error).strip()[:500]})"
            if run.start_step == 0:
                Trackers(found).close(None)
                raise RecipeError(f"{reason}; correct its settings, or leave it out of report_to") from error
            log.warning("%s; the run continues without it", reason)
    return Trackers(found)


def check_trackers(recipe: Recipe) -> None:
    """Raise RecipeError if a package or a setting is missing that a tracker of ``report_to`` needs."""
    for name in recipe.report_to:
        kind: type[Tracker] = TRACKERS.get(name)
        if kind.package is not None and importlib.util.find_spec(kind.package) is None:
            target = f"'dreamfleet[{kind.extra}]'" if kind.extra else kind.package
            raise RecipeError(
                f"report_to: {name} needs a package that is not installed: pip install {target}, on every machine "
                "of a cluster, or leave it out"
            )
        kind.check(recipe)


def variables_for(recipe: Recipe) -> dict[str, str]:
    """Return the variables that a run's workers need, for its buckets and trackers. Secrets: never log the result."""
    found = variables_to_send(buckets="://" in recipe.to_yaml())
    for name in recipe.report_to:
        found |= TRACKERS.get(name).environment()
    return found


def local_folder(recipe: Recipe) -> str | None:
    """Return the folder for what trackers store without a server; None if it is in a bucket."""
    folder = recipe.tracking.folder or recipe.output_dir.rstrip("/").rpartition("/")[0]
    return None if "://" in folder else folder


def flatten(tree: Mapping[str, Any], *, separator: str = "/", prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as one level, with joined keys; empty mappings are left out."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, separator=separator, prefix=f"{prefix}{name}{separator}"))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
