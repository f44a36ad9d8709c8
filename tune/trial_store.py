"""The trial store: the trials of a search in ``trials.json``, the only state that a search is resumed from."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dreamfleet.datasets import errors
from dreamfleet.datasets.errors import ResourceError, RunFailed, UserError
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.metrics import HELD_OUT
from dreamfleet.trainers.config.search import Point, Value, put_point
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.trainers.report import formatting
from dreamfleet.tune.search_state import EarlierTrial, SearchState

FILE = "trials.json"
RECIPE = "search.yaml"

# Number of equal failures, before any trial has measured anything, that end a search. More are needed for
# ResourceErrors, since other points may need less memory.
EQUAL_FAILURES, EQUAL_RESOURCE_FAILURES = 3, 6


@dataclass
class Trial:
    """A point and the results of training with it; ``rounds`` are its validation rounds (``step`` and metrics).

    A trial counts by its best round, whose checkpoint is kept. ``metric`` and ``maximise`` define the best; the trial
    store sets them. ``gpu_seconds``: seconds times GPUs, divided by the number of trials that shared them. ``ended``: 1
    for the first trial that ended, 2 for the second; None before its end. ``kept``: whether its weights exist.
    """

    name: str
    point: Point
    status: str = "running"  # or: completed, stopped (by the scheduler), interrupted, failed
    rounds: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None
    kind: str | None = None  # class name of the error
    gpu_seconds: float = 0.0
    ended: int | None = None
    kept: bool = True
    metric: str = field(default=HELD_OUT, compare=False, repr=False)
    maximise: bool = field(default=False, compare=False, repr=False)

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

    @property
    def best_round(self) -> dict[str, Any] | None:
        """The round with the best metric after step 0, the first of equal ones; None if it was never measured."""
        measured = [r for r in self.rounds if r["step"] and _is_finite(r.get(self.metric))]
        sign = -1 if self.maximise else 1
        return min(measured, key=lambda r: (sign * r[self.metric], r["step"]), default=None)

    @property
    def best_step(self) -> int | None:
        """The optimizer step of the best round."""
        return int(self.best_round["step"]) if self.best_round else None

    def figure(self, name: str) -> float | None:
        """Return a value of the best round; None if it is missing or not finite."""
        value = (self.best_round or {}).get(name)
        return value if _is_finite(value) else None

    def add_round(self, figures: dict[str, Any]) -> None:
        """Add a round, replacing rounds of the same and later steps."""
        kept = [r for r in self.rounds if r["step"] < figures["step"]]
        self.rounds = [*kept, figures]


class TrialStore:
    """The trials of a search; ``figures`` are the keys that a validation round measures.

    ``clock`` returns seconds. The state is read from ``trials.json`` by :func:`read_store`.
    """

    def __init__(
        self,
        recipe: Recipe,
        trials: Sequence[Trial] = (),
        *,
        state: SearchState | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        assert recipe.search is not None
        self.recipe, self.search = recipe, recipe.search
        self.folder = Storage(recipe.output_dir)
        self.figures = recipe.figures
        self.state = state or SearchState()
        self.trials = list(trials)
        for trial in self.trials:
            trial.metric, trial.maximise = self.search.objective, self.search.maximise
        self._clock, self._since = clock, clock()

    @property
    def elapsed(self) -> float:
        """The wall-clock seconds of all sessions of the search."""
        return self.state.seconds + self._clock() - self._since

    @property
    def gpu_seconds(self) -> float:
        """The GPU time of all trials."""
        return sum(trial.gpu_seconds for trial in self.trials)

    def add(self, point: Point) -> Trial:
        """Append a trial for a point and return it."""
        name = f"trial-{len(self.trials):03d}"
        trial = Trial(name, point, metric=self.search.objective, maximise=self.search.maximise)
        self.trials.append(trial)
        return trial

    def trial(self, name: str) -> Trial:
        """Return the trial called ``name``."""
        return next(trial for trial in self.trials if trial.name == name)

    def start(self, trial: Trial) -> None:
        """Record the start or restart of a trial."""
        trial.status, trial.error, trial.kind, trial.ended = "running", None, None, None
        self.save()

    def record(self, trial: Trial, figures: dict[str, Any]) -> None:
        """Record a validation round: ``step`` and the measured figures."""
        trial.add_round(figures)
        self.save()

    def end(self, trial: Trial, status: str, *, error: str | None = None, kind: str | None = None) -> None:
        """Record the end of a trial; ``status``: completed, stopped, interrupted or failed."""
        trial.status, trial.error, trial.kind = status, error, kind
        if trial.is_over and trial.ended is None:
            trial.ended = 1 + max((other.ended or 0 for other in self.trials), default=0)
        self.save()

    def save(self) -> None:
        """Write ``trials.json``."""
        rows = [dataclasses.asdict(trial) for trial in self.trials]
        for row in rows:
            del row["metric"], row["maximise"]
        state = {**dataclasses.asdict(self.state), "seconds": self.elapsed}
        self.folder.write_text(FILE, json_text({"trials": rows, "search": state}, indent=1))

    def remove(self) -> None:
        """Remove the files of a search that has no trials."""
        for name in (FILE, RECIPE, "trials"):
            self.folder.remove(name)

    def losses(self, trial: Trial) -> tuple[float, ...] | None:
        """Return the trial's metrics, negated where higher is better; None if one was not measured."""
        values = [trial.figure(metric) for metric in self.search.metrics]
        if None in values:
            return None
        pairs = zip(self.search.metrics, values, strict=True)
        return tuple(
            -value if self.search.maximises(metric) else value for metric, value in pairs if value is not None
        )

    def ranking(self) -> list[Trial]:
        """Return the trials from the best to the worst by the first metric in their best rounds.

        Failed trials come after the others, and trials that measured nothing last.
        """

        def rank(trial: Trial) -> tuple[int, float]:
            value = trial.figure(self.search.objective)
            if value is None:
                return 2, 0.0
            return int(trial.status == "failed"), -value if self.search.maximise else value

        return sorted(self.trials, key=rank)

    @property
    def best(self) -> Trial | None:
        """The best trial that did not fail; None if none has measured the first metric."""
        first = next(iter(self.ranking()), None)
        has_result = first is not None and first.status != "failed" and first.best_round is not None
        return first if has_result else None

    def front(self) -> list[Trial]:
        """Return the Pareto front, the best first: trials that no other surpasses in all metrics; of one, the best."""
        if len(self.search.metrics) == 1:
            return [self.best] if self.best else []
        ranked = [trial for trial in self.ranking() if trial.status != "failed"]
        measured = [(trial, losses) for trial in ranked if (losses := self.losses(trial)) is not None]
        return [
            trial for trial, losses in measured if not any(dominates(other, losses) for _, other in measured)
        ]


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether losses are nowhere above others, and below them somewhere."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def read_store(recipe: Recipe, *, clock: Callable[[], float] = time.monotonic) -> TrialStore:
    """Read the trial store in a recipe's ``output_dir``."""
    content = json.loads(Storage(recipe.output_dir).read_text(FILE))
    state = content.get("search", {})
    earlier = [EarlierTrial(**row) for row in state.pop("earlier", [])]
    trials = [Trial(**row) for row in content["trials"]]
    return TrialStore(recipe, trials, state=SearchState(**state, earlier=earlier), clock=clock)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


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


def trial_recipe(recipe: Recipe, point: Point, output_dir: str, *, workers: int = 0) -> Recipe:
    """Return the recipe of a trial: one point, trained by ``workers`` (0: in this process), without exports.

    Raises RecipeError if the point makes the recipe invalid.
    """
    tree = _put(recipe, point, output_dir)
    tree["scaling"]["num_workers"] = workers
    tree["validation"]["resources"] = None  # rounds on the trial's own workers: the search waits for them
    tree["train"]["export"] = False  # the search exports the trials that it keeps
    tree["tracking"] = recipe.tracking.of_group(recipe.output_dir).model_dump(mode="json")
    return build_recipe(tree, source=f"trial of {point}")


def best_recipe(recipe: Recipe, point: Point, output_dir: str) -> Recipe:
    """Return the recipe of one point for `dreamfleet train`, with the recipe's own workers."""
    return build_recipe(_put(recipe, point, output_dir), source=f"recipe of {point}")


def _put(recipe: Recipe, point: Point, output_dir: str) -> dict[str, Any]:
    """Return the plain tree of a recipe of one point, whose best checkpoint is that of the search's first metric."""
    tree = put_point(recipe.model_dump(mode="json", exclude={"search"}), point)
    tree["output_dir"] = output_dir
    if (search := recipe.search) is not None:
        tree["validation"] |= {"metric_for_best": search.objective, "greater_is_better": search.maximise}
    return tree
