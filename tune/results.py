"""Writes the result files of a search: ``trials.parquet``, ``best.yaml`` and the recipes of the Pareto front."""

from __future__ import annotations

import io
from typing import Any

from dreamfleet.trainers.report import formatting
from dreamfleet.tune.trial_store import Trial, TrialStore, best_recipe, format_point
from dreamfleet.tune.votes import preferences, read_votes

TABLE = "trials.parquet"
BEST = "best.yaml"
FRONT = "front"  # folder of the recipes of the Pareto front


def write_table(store: TrialStore) -> None:
    """Write ``trials.parquet``, one row per trial; figures are those of the best rounds.

    With votes of blind comparisons: their number, the wins, and the estimated chance to be preferred.
    """
    import pyarrow as pa
    import pyarrow.parquet

    trials, search, front = store.trials, store.search, store.front()

    def floats(name: str) -> Any:
        return pa.array([t.figure(name) for t in trials], pa.float64())

    columns = {
        "trial": pa.array([t.name for t in trials], pa.string()),
        "status": pa.array([t.status for t in trials], pa.string()),
        **{path: _column([t.point[path] for t in trials]) for path in search.space},
        "objective": floats(search.objective),
        **{name: floats(name) for name in store.figures},
        "best_step": pa.array([t.best_step for t in trials], pa.int64()),
        "steps": pa.array([t.steps for t in trials], pa.int64()),
        "seconds": pa.array([t.seconds for t in trials], pa.float64()),
        "gpu_seconds": pa.array([t.gpu_seconds for t in trials], pa.float64()),
        "on_front": pa.array([t in front for t in trials], pa.bool_()),
        "kept": pa.array([t.kept for t in trials], pa.bool_()),
        "run_folder": pa.array([store.folder.path(t.folder) for t in trials], pa.string()),
        "error": pa.array([t.error for t in trials], pa.string()),
    }
    if preferred := preferences(read_votes(store.folder)):
        found = [preferred.get(t.name) for t in trials]
        columns["votes"] = pa.array([one.votes if one else 0 for one in found], pa.int64())
        columns["wins"] = pa.array([one.wins if one else 0.0 for one in found], pa.float64())
        columns["preferred"] = pa.array([one.chance if one else None for one in found], pa.float64())
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), buffer)
    store.folder.write_bytes(TABLE, buffer.getvalue())


def write_best(store: TrialStore) -> None:
    """Write ``best.yaml``, the recipe of the best trial by the first metric, and ``front/`` for several metrics.

    The recipes in ``front/`` are those of the Pareto front; ``best.yaml`` lists them.
    """
    best, search = store.best, store.search
    if best is None:
        return
    head = f"# The best of {len(store.trials)} trials by {search.objective}: {_describe(store, best)}\n"
    if len(search.metrics) > 1:
        front = store.front()
        store.folder.remove(FRONT)
        for trial in front:
            text = f"# {_describe(store, trial)}\n" + _recipe_text(store, trial, f"{FRONT}/{trial.name}")
            store.folder.write_text(f"{FRONT}/{trial.name}.yaml", text)
        head += f"# The Pareto front of {', '.join(search.metrics)}:\n"
        head += "".join(f"#   {FRONT}/{trial.name}.yaml: {_describe(store, trial)}\n" for trial in front)
    store.folder.write_text(BEST, head + _recipe_text(store, best, "best"))


def _recipe_text(store: TrialStore, trial: Trial, output_dir: str) -> str:
    return best_recipe(store.recipe, trial.point, store.folder.path(output_dir)).to_yaml()


def _describe(store: TrialStore, trial: Trial) -> str:
    figures = [
        f"{name} {formatting.number(value, 4)}"
        for name in store.search.metrics
        if (value := trial.figure(name)) is not None
    ]
    return f"{trial.name}, {format_point(trial.point)} ({', '.join(figures)} at step {trial.best_step})"


def _column(values: list[Any]) -> Any:
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # the values of a key are both numbers and text
        return pa.array([None if value is None else str(value) for value in values])
