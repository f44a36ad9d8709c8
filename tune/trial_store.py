"""The record of a search: one row a trial, in ``trials.json``. It is all that a search remembers of itself."""

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
from dreamfleet.trainers.config.search import Point, Value, figures_of, put_point
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.trainers.report import formatting
from dreamfleet.trainers.run.run_folder import is_used

FILE = "trials.json"
TABLE = "trials.parquet"
BEST = "best.yaml"
RECIPE = "search.yaml"
_PARCEL = re.compile(r"^/.*/_ray_pkg_[0-9a-f]+/")
# What may change between a search and its continuation: how the trials are run, not what they are.
FREE = (
    "num_trials",
    "max_concurrent_trials",
    "resources_per_trial",
    "scheduler",
    "grace_period",
    "reduction_factor",
)


# So many trials that fail alike, before any has measured something, end a search. Memory may suffice for other points.
ALIKE, ALIKE_FOR_RESOURCES = 3, 6


@dataclass
class Trial:
    """One point that was, or is being, tried. ``rounds`` are its validation rounds: ``step`` and figures."""

    name: str
    point: Point
    status: str = "running"  # or: completed, stopped (by the scheduler), interrupted, failed
    rounds: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None
    kind: str | None = None  # the class of the error

    @property
    def folder(self) -> str:
        """Its run folder, inside the search's."""
        return f"trials/{self.name}"

    @property
    def is_over(self) -> bool:
        """Whether a continued search leaves it as it is."""
        return self.status in ("completed", "stopped", "failed")

    @property
    def steps(self) -> int:
        """The optimizer step of its last round."""
        return max((int(r["step"]) for r in self.rounds), default=0)

    def figure(self, name: str) -> float | None:
        """What its last round, the untuned model apart, measured under that name."""
        last = max((r for r in self.rounds if r["step"]), key=lambda r: r["step"], default={})
        value = last.get(name)
        return value if isinstance(value, int | float) and math.isfinite(value) else None

    def add_round(self, figures: dict[str, Any]) -> None:
        """Take in a round; one of a step that was told before takes its place."""
        kept = [r for r in self.rounds if r["step"] < figures["step"]]
        self.rounds = [*kept, figures]


class TrialStore:
    """The trials of a search, saved as they change; ``figures`` are what a validation round measures."""

    def __init__(self, recipe: Recipe, trials: Sequence[Trial] = ()):
        assert recipe.search is not None
        self.recipe, self.search = recipe, recipe.search
        self.folder = Storage(recipe.output_dir)
        self.figures = figures_of(recipe)
        self.trials = list(trials)

    def add(self, point: Point) -> Trial:
        """Write a new trial down."""
        trial = Trial(f"trial-{len(self.trials):03d}", point)
        self.trials.append(trial)
        return trial

    def trial(self, name: str) -> Trial:
        """Return the trial of that name."""
        return next(trial for trial in self.trials if trial.name == name)

    def save(self) -> None:
        """Write the record, beside the recipe of the search."""
        rows = [dataclasses.asdict(trial) for trial in self.trials]
        self.folder.write_text(FILE, json_text({"trials": rows}, indent=1))

    def forget(self) -> None:
        """Leave nothing behind, for a search that never began."""
        for name in (FILE, RECIPE, "trials"):
            self.folder.remove(name)

    def ranking(self) -> list[Trial]:
        """List the trials from the best to the worst.

        Those that ran to the end come first, by the metric; then the ones that were stopped, the longer the better;
        then those that measured nothing.
        """

        def place(trial: Trial) -> tuple[Any, ...]:
            value = trial.figure(self.search.metric)
            if value is None:
                return (2, 0, 0.0)
            worse = -value if self.search.maximise else value
            return (0, 0, worse) if trial.status == "completed" else (1, -trial.steps, worse)

        return sorted(self.trials, key=place)

    @property
    def best(self) -> Trial | None:
        """The best trial; None before any has measured the metric."""
        first = next(iter(self.ranking()), None)
        return first if first is not None and first.figure(self.search.metric) is not None else None

    def write_table(self) -> None:
        """Write ``trials.parquet``: a row a trial."""
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
        """Write ``best.yaml``: the recipe with the best trial's values, to be trained as it is."""
        if self.best is not None:
            told = f"{self.best.name}, {format_point(self.best.point)}"
            head = f"# The best of {len(self.trials)} trials by {self.search.metric}: {told}\n"
            chosen = trial_recipe(self.recipe, self.best.point, self.folder.path("best"), alone=False)
            self.folder.write_text(BEST, head + chosen.to_yaml())


def error_class(trial: Trial) -> type[Exception]:
    """Return the class of a failed trial's error."""
    return getattr(errors, trial.kind) if trial.kind else RunFailed


def common_error(trials: Sequence[Trial], planned: int) -> UserError | None:
    """Return the error that all trials would meet: the user's to mend, and met alike by the first ones.

    ``planned`` is how many trials the search has. None while any trial has measured something.
    """
    failed = [trial for trial in trials if trial.status == "failed"]
    if not failed or any(trial.rounds for trial in trials):
        return None
    first, kind = failed[0], error_class(failed[0])
    enough = ALIKE_FOR_RESOURCES if issubclass(kind, ResourceError) else ALIKE
    alike = {(trial.kind, str(trial.error).replace(trial.name, "")) for trial in failed}
    if not issubclass(kind, UserError) or len(alike) > 1 or len(failed) < min(enough, planned):
        return None
    return kind(first.error)


def format_trial(trial: Trial, figures: Sequence[str]) -> str:
    """Write a line on how a trial is doing."""
    last = trial.rounds[-1] if trial.rounds else {}
    measured = [
        f"{name} {formatting.number(last[name], 4)}" for name in figures if last.get(name) is not None
    ]
    words = "  ".join(
        [trial.name, format_point(trial.point), *([f"step {trial.steps}"] if trial.rounds else []), *measured]
    )
    if trial.status == "running":
        return words
    return f"{words}  {trial.status} after {formatting.seconds(trial.seconds)}" + (
        f": {trial.error}" if trial.error else ""
    )


def format_point(point: Point) -> str:
    """Write a point for people: learning_rate 0.0012, num_vectors 2."""
    return ", ".join(f"{path.rpartition('.')[2]} {format_value(value)}" for path, value in point.items())


def format_value(value: Value) -> str:
    """Write one searched value for people."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return formatting.number(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _column(values: list[Any]) -> Any:
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # numbers and words among a key's values
        return pa.array([None if value is None else str(value) for value in values])


def trial_recipe(recipe: Recipe, point: Point, output_dir: str, *, alone: bool = True) -> Recipe:
    """Return the recipe of one point: in a process of its own (``alone``), or with the recipe's own workers.

    Raises RecipeError for a point that does not make a valid recipe.
    """
    tree = put_point(recipe.model_dump(mode="json", exclude={"search"}), point)
    tree["output_dir"] = output_dir
    if alone:
        tree["scaling"]["num_workers"] = 0
    return build_recipe(tree, source=f"trial of {point}")


def open_store(recipe: Recipe, *, resume: bool) -> TrialStore:
    """Return the record of the search in ``output_dir``: an empty one, or with ``resume`` the one that lies there.

    Raises RecipeError for a folder that is in use and not to be continued, CheckpointError for a search of something
    else.
    """
    folder = Storage(recipe.output_dir)
    here = f"output_dir {recipe.output_dir}"
    if folder.exists(FILE):
        if not resume:
            raise RecipeError(
                f"{here} holds a search already; continue it with --resume, or give another output_dir"
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
        for name in FREE:
            tree["search"].pop(name, None)
        for name in ("scaling", "output_dir", "report_to"):
            tree.pop(name, None)
    if changed := sorted(_differences(before, now)):
        raise CheckpointError(
            f"output_dir {recipe.output_dir} holds a search of something else: {', '.join(changed[:5])} changed since. "
            f"What can change is search.{', search.'.join(FREE)} and scaling; for all else give another output_dir"
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
    # Ray unpacks what a submitted job takes along into a folder named after all of it, the recipe included.
    return _PARCEL.sub("", value) if isinstance(value, str) else value
