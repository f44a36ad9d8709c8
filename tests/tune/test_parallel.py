"""Parallel coordinates of the trials of a search."""

from __future__ import annotations

from pathlib import Path

import pytest
from searches import make_many_trials, make_recipe, make_recipe_of_two_metrics

from dreamfleet.tune.parallel import Axis, ParallelPlot, parallel_plot
from dreamfleet.tune.trial_store import Trial, TrialStore


def make_plot(store: TrialStore) -> ParallelPlot:
    shown = [trial for trial in store.ranking() if trial.best_round]
    found = parallel_plot(store, shown)
    assert found is not None
    return found


def heights(path: str) -> list[float]:
    """Return the heights of a line on the axes, 0 at the bottom and 1 at the top."""
    return [1 - float(point.split()[1]) / 1000 for point in path.removeprefix("M").split("L")]


def test_a_line_for_each_trial_through_all_axes(tmp_path: Path) -> None:
    store = TrialStore(make_recipe(tmp_path), make_many_trials(100))
    plot = make_plot(store)
    assert [axis.title for axis in plot.axes] == ["learning_rate", "num_vectors", "held-out loss"]
    assert len(plot.marks) == 100 and {mark.key for mark in plot.marks} == {t.name for t in store.trials}
    assert all(0 <= height <= 1 for mark in plot.marks for height in heights(mark.path))
    best = plot.marks[-1]  # drawn last, above the others
    assert (
        store.best and best.key == store.best.name and best.style == "g0 best" and heights(best.path)[-1] == 1
    )
    grades = [mark.style.split()[0] for mark in plot.marks[::-1]]
    assert grades == sorted(grades) and grades.count("g0") == grades.count("g4") == 20


def test_scales_of_the_axes(tmp_path: Path) -> None:
    def trial(rate: float, vectors: int, loss: float) -> Trial:
        point = {"optimizer.learning_rate": rate, "method.num_vectors": vectors}
        return Trial(f"t{rate}", point, "completed", [{"step": 10, "holdout_loss": loss}])

    plot = make_plot(
        TrialStore(make_recipe(tmp_path), [trial(1e-4, 1, 0.3), trial(1e-1, 4, 0.5), trial(1e-3, 2, 0.4)])
    )
    lines = {mark.key: heights(mark.path) for mark in plot.marks}
    assert lines["t0.0001"] == pytest.approx([0, 0, 1], abs=1e-3)
    assert lines["t0.001"] == pytest.approx([1 / 3, 0.5, 0.5], abs=1e-3)  # the rate's scale is logarithmic
    assert lines["t0.1"] == pytest.approx([1, 1, 0], abs=1e-3)

    def ticks(axis: Axis) -> dict[str, float]:
        return {text: place for place, text in axis.ticks}

    assert ticks(plot.axes[0])["1e-4"] == pytest.approx(100) and ticks(plot.axes[0])["0.1"] == pytest.approx(
        0
    )
    assert ticks(plot.axes[1]) == {"1": 100, "2": 50, "4": 0}


def test_better_values_of_every_metric_are_at_the_top(tmp_path: Path) -> None:
    recipe = make_recipe_of_two_metrics(tmp_path)
    store = TrialStore(recipe, make_many_trials(20))
    plot = make_plot(store)
    assert [axis.title for axis in plot.axes[2:]] == ["held-out loss", "CLIP-I"]
    highest = max(store.trials, key=lambda trial: trial.figure("clip_i") or 0)
    assert plot.axes[3].place(highest) == 1


def test_a_diverged_trial_does_not_flatten_the_axis(tmp_path: Path) -> None:
    trials = make_many_trials(20)
    trials[0].rounds[-1]["holdout_loss"] = trials[0].rounds[1]["holdout_loss"] = 1e9
    trials[0].rounds = trials[0].rounds[:2]
    plot = make_plot(TrialStore(make_recipe(tmp_path), trials))
    places = sorted(plot.axes[2].place(trial) or 0.0 for trial in trials)
    assert places[0] == 0 and places[10] > 0.5


def test_without_two_measured_trials_there_is_no_plot(tmp_path: Path) -> None:
    store = TrialStore(make_recipe(tmp_path), make_many_trials(1))
    assert parallel_plot(store, store.trials) is None and parallel_plot(store, []) is None
