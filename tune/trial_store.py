"""The trial store: the trials of a search in ``trials.json``, the only state that a search is resumed from."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from dreamfleet.datasets import errors
from dreamfleet.datasets.errors import CheckpointError, RecipeError, ResourceError, RunFailed, UserError
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.search import Point, Value, put_point
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.run.run_folder import is_used

FILE = "trials.json"
TABLE = "trials.parquet"
BEST = "best.yaml"
RECIPE = "search.yaml"
_PACKAGE = re.compile(r"^/.*/_ray_pkg_[0-9a-f]+/")
# Keys of `search` that may change when a search is resumed: they determine how trials are run, not what they train.
CHANGEABLE = (
    "num_trials",
    "max_concurrent_trials",
    "resources_per_trial",
    "scheduler",
    "grace_period",
    "reduction_factor",
)

# Number of equal failures, before any trial has measured anything, that end a search. More are needed for
# ResourceErrors, since other points may need less memory.
EQUAL_FAILURES, EQUAL_RESOURCE_FAILURES = 3, 6


@dataclass
class Trial:
    """A point and the results of training with it; ``rounds`` are its validation rounds (``step`` and metrics)."""

    name: str
    point: Point
    status: str = "running"  # or: completed, stopped (by the scheduler), interrupted, failed
    rounds: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None
    kind: str | None = None  # class name of the error

    @property
    def folder(self) -> str:
        """The run folder, relative to the folder of the search."""
        return f"trials/{self.name}"

    @property
    def is_over(self) -> bool:
        """Whether the trial has ended, so that a resumed search does not run it again."""
        return self.status in ("completed", "stopped", "failed")

    @property
    def steps(self) -> int:
        """The optimizer step of the last round."""
        return max((int(r["step"]) for r in self.rounds), default=0)

    def figure(self, name: str) -> float | None:
        """Return a value of the last round after step 0; None if it is missing or not finite."""
        last = max((r for r in self.rounds if r["step"]), key=lambda r: r["step"], default={})
        value = last.get(name)
        return value if isinstance(value, int | float) and math.isfinite(value) else None

    def add_round(self, figures: dict[str, Any]) -> None:
        """Add a round, replacing rounds of the same and later steps."""
        kept = [r for r in self.rounds if r["step"] < figures["step"]]
        self.rounds = [*kept, figures]


class TrialStore:
    """The trials of a search; ``figures`` are the keys that a validation round measures."""

    def __init__(self, recipe: Recipe, trials: Sequence[Trial] = ()):
        assert recipe.search is not None
        self.recipe, self.search = recipe, recipe.search
        self.folder = Storage(recipe.output_dir)
        self.figures = recipe.figures
        self.trials = list(trials)

    def add(self, point: Point) -> Trial:
        """Append a trial for a point and return it."""
        trial = Trial(f"trial-{len(self.trials):03d}", point)
        self.trials.append(trial)
        return trial

    def trial(self, name: str) -> Trial:
        """Return the trial called ``name``."""
        return next(trial for trial in self.trials if trial.name == name)

    def save(self) -> None:
        """Write ``trials.json``."""
        rows = [dataclasses.asdict(trial) for trial in self.trials]
        self.folder.write_text(FILE, json_text({"trials": rows}, indent=1))

    def remove(self) -> None:
        """Remove the files of a search that has no trials."""
        for name in (FILE, RECIPE, "trials"):
            self.folder.remove(name)

    def ranking(self) -> list[Trial]:
        """Return the trials from the best to the worst.

        Completed trials come first, by the metric; then unfinished ones, by their steps and then the metric; then
        trials that measured nothing.
        """

        def rank(trial: Trial) -> tuple[Any, ...]:
            value = trial.figure(self.search.metric)
            if value is None:
                return (2, 0, 0.0)
            worse = -value if self.search.maximise else value
            return (0, 0, worse) if trial.status == "completed" else (1, -trial.steps, worse)

        return sorted(self.trials, key=rank)

    @property
    def best(self) -> Trial | None:
        """The best trial; None if none has measured the metric."""
        first = next(iter(self.ranking()), None)
        return first if first is not None and first.figure(self.search.metric) is not None else None

    def write_table(self) -> None:
        """Write ``trials.parquet``, one row per trial."""
        import pyarrow as pa
        import pyarrow.parquet

        trials = self.trials
        columns = {
            "trial": pa.array([t.name for t in trials], pa.string()),
            "status": pa.array([t.status for t in trials], pa.string()),
            **{path: _column([t.point[path] for t in trials]) for path in self.search.space},
            "objective": pa.array([t.figure(self.search.metric) for t in trials], pa.float64()),
            "clip_i": pa.array([t.figure("clip_i") for t in trials], pa.float64()),
            "steps": pa.array([t.steps for t in trials], pa.int64()),
            "seconds": pa.array([t.seconds for t in trials], pa.float64()),
            "run_folder": pa.array([self.folder.path(t.folder) for t in trials], pa.string()),
            "error": pa.array([t.error for t in trials], pa.string()),
        }
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pa.table(columns), buffer)
        self.folder.write_bytes(TABLE, buffer.getvalue())

    def write_best(self) -> None:
        """Write ``best.yaml``, the recipe with the best trial's values."""
        if self.best is not None:
            best = f"{self.best.name}, {format_point(self.best.point)}"
            head = f"# The best of {len(self.trials)} trials by {self.search.metric}: {best}\n"
            chosen = trial_recipe(self.recipe, self.best.point, self.folder.path("best"), alone=False)
            self.folder.write_text(BEST, head + chosen.to_yaml())


def error_class(trial: Trial) -> type[Exception]:
    """Return the class of a failed trial's error."""
    return getattr(errors, trial.kind) if trial.kind else RunFailed


def common_error(trials: Sequence[Trial], planned: int) -> UserError | None:
    """Return the UserError with which all of the first trials failed, since every trial would; None if there is none.

    ``planned`` is the number of trials of the search. Also None once any trial has measured anything.
    """
    failed = [trial for trial in trials if trial.status == "failed"]
    if not failed or any(trial.rounds for trial in trials):
        return None
    first, kind = failed[0], error_class(failed[0])
    enough = EQUAL_RESOURCE_FAILURES if issubclass(kind, ResourceError) else EQUAL_FAILURES
    causes = {(trial.kind, str(trial.error).replace(trial.name, "")) for trial in failed}
    if not issubclass(kind, UserError) or len(causes) > 1 or len(failed) < min(enough, planned):
        return None
    return kind(first.error)


def format_trial(trial: Trial, figures: Sequence[str]) -> str:
    """Return one line of text on a trial: its point, its last metrics, and its status."""
    last = trial.rounds[-1] if trial.rounds else {}
    measured = [
        f"{name} {formatting.number(last[name], 4)}" for name in figures if last.get(name) is not None
    ]
    line = "  ".join(
        [trial.name, format_point(trial.point), *([f"step {trial.steps}"] if trial.rounds else []), *measured]
    )
    if trial.status == "running":
        return line
    return f"{line}  {trial.status} after {formatting.seconds(trial.seconds)}" + (
        f": {trial.error}" if trial.error else ""
    )


def format_point(point: Point) -> str:
    """Return a point as text: learning_rate 0.0012, num_vectors 2."""
    return ", ".join(f"{path.rpartition('.')[2]} {format_value(value)}" for path, value in point.items())


def format_value(value: Value) -> str:
    """Return one searched value as text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return formatting.number(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _column(values: list[Any]) -> Any:
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # the values of a key are both numbers and text
        return pa.array([None if value is None else str(value) for value in values])


def trial_recipe(recipe: Recipe, point: Point, output_dir: str, *, alone: bool = True) -> Recipe:
    """Return the recipe of one point, for training in one process (``alone``) or with the recipe's own workers.

    Raises RecipeError if the point makes the recipe invalid.
    """
    tree = put_point(recipe.model_dump(mode="json", exclude={"search"}), point)
    tree["output_dir"] = output_dir
    if alone:
        tree["scaling"]["num_workers"] = 0
    return build_recipe(tree, source=f"trial of {point}")


def open_store(recipe: Recipe, *, resume: bool) -> TrialStore:
    """Return the trial store of the search in ``output_dir``: a new one, or with ``resume`` the existing one.

    Raises RecipeError if the folder is in use and not resumed, CheckpointError if it holds a different search.
    """
    folder = Storage(recipe.output_dir)
    here = f"output_dir {recipe.output_dir}"
    if folder.exists(FILE):
        if not resume:
            raise RecipeError(
                f"{here} already holds a search; continue it with --resume, or give another output_dir"
            )
        _refuse_another_search(folder, recipe)
        trials = [Trial(**row) for row in json.loads(folder.read_text(FILE))["trials"]]
        return TrialStore(recipe, trials)
    if is_used(folder):
        raise RecipeError(f"{here} is not empty and holds no search; give another output_dir")
    return TrialStore(recipe)


def _refuse_another_search(folder: Storage, recipe: Recipe) -> None:
    before = yaml.safe_load(folder.read_text(RECIPE))
    now = recipe.model_dump(mode="json")
    for tree in (before, now):
        for name in CHANGEABLE:
            tree["search"].pop(name, None)
        for name in ("scaling", "output_dir", "report_to"):
            tree.pop(name, None)
    if changed := sorted(_differences(before, now)):
        raise CheckpointError(
            f"output_dir {recipe.output_dir} holds a different search: {', '.join(changed[:5])} changed. "
            f"Only search.{', search.'.join(CHANGEABLE)} and scaling may change; otherwise give another output_dir"
        )


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = before.keys() | now.keys()
        return [
            x
            for key in keys
            for x in _differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if _without_package_path(before) == _without_package_path(now) else [path]


def _without_package_path(value: Any) -> Any:
    # Ray unpacks the package of a submitted job into a folder whose name is a hash of the content, recipe included.
    return _PACKAGE.sub("", value) if isinstance(value, str) else value
