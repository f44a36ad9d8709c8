"""When and why a search ends: budgets in trials, hours and GPU hours, and trials without improvement."""

from __future__ import annotations

from pathlib import Path

from searches import make_recipe

from dreamfleet.tune.algorithm import SearchAlgorithm
from dreamfleet.tune.limits import describe_end, trials_without_improvement
from dreamfleet.tune.trial_store import TrialStore, read_store


class Clock:
    """A clock that tests move."""

    now = 50.0

    def __call__(self) -> float:
        return self.now


def run_trial(algorithm: SearchAlgorithm, loss: float | None) -> bool:
    """Run the next trial with a result; return whether there was one."""
    store, trial = algorithm.store, algorithm.suggest()
    if trial is None:
        return False
    store.start(trial)
    if loss is not None:
        store.record(trial, {"step": 10, "holdout_loss": loss})
    store.end(trial, "completed" if loss is not None else "failed")
    return True


def test_trials_that_improve_nothing_end_the_search(tmp_path: Path) -> None:
    """An equal result and a failed trial improve nothing."""
    store = TrialStore(make_recipe(tmp_path / "s", num_trials=None, patience=3))
    algorithm = SearchAlgorithm(store)
    losses = [0.9, 0.8, 0.8, None, 0.7, 0.7, 0.75, None, 0.1]
    assert [run_trial(algorithm, loss) for loss in losses] == [True] * 8 + [False]
    assert algorithm.end_reason == "patience" and "3 trials in a row" in describe_end(store)
    more = TrialStore(
        make_recipe(tmp_path / "s", num_trials=None, patience=4), read_store(store.recipe).trials
    )
    assert run_trial(SearchAlgorithm(more), 0.1)


def test_improvement_is_counted_in_the_order_of_the_ends(tmp_path: Path) -> None:
    store = TrialStore(make_recipe(tmp_path / "s"))
    trials = [store.add({"optimizer.learning_rate": 1e-3 * k, "method.num_vectors": 1}) for k in (1, 2, 3)]
    for trial, loss in zip(reversed(trials), (0.5, 0.6, 0.4), strict=True):
        store.record(trial, {"step": 10, "holdout_loss": loss})
        store.end(trial, "completed")
    assert trials_without_improvement(store) == 0
    store.end(store.add({"optimizer.learning_rate": 4e-3, "method.num_vectors": 1}), "interrupted")
    assert trials_without_improvement(store) == 0


def test_hours_of_all_sessions_end_the_search_and_its_running_trials(tmp_path: Path) -> None:
    clock = Clock()
    recipe = make_recipe(tmp_path / "s", num_trials=None, max_hours=2)
    store = TrialStore(recipe, clock=clock)
    algorithm = SearchAlgorithm(store)
    assert run_trial(algorithm, 0.5)
    clock.now += 1.5 * 3600
    assert run_trial(algorithm, 0.4) and not algorithm.interrupts
    assert algorithm.suggest() is not None
    store.save()
    again = TrialStore(recipe, read_store(recipe).trials, state=read_store(recipe).state, clock=clock)
    resumed = SearchAlgorithm(again)
    assert not resumed.interrupts
    clock.now += 0.6 * 3600
    assert resumed.interrupts and resumed.suggest() is None  # not even the interrupted trial
    assert resumed.end_reason == "max_hours" and "search.max_hours: 2" in describe_end(again)


def test_gpu_hours_end_the_search(tmp_path: Path) -> None:
    store = TrialStore(make_recipe(tmp_path / "s", num_trials=None, max_gpu_hours=0.5))
    algorithm = SearchAlgorithm(store)
    assert run_trial(algorithm, 0.5)
    store.trials[0].gpu_seconds = 1000.0
    assert run_trial(algorithm, 0.4) and not algorithm.interrupts
    store.trials[1].gpu_seconds = 801.0
    assert algorithm.interrupts and not run_trial(algorithm, 0.3)
    assert algorithm.end_reason == "max_gpu_hours" and "GPU time" in describe_end(store)


def test_the_number_of_trials_ends_the_search(tmp_path: Path) -> None:
    store = TrialStore(make_recipe(tmp_path / "s", num_trials=2))
    algorithm = SearchAlgorithm(store)
    assert describe_end(store) == ""
    assert [run_trial(algorithm, 0.5) for _ in range(3)] == [True, True, False]
    assert describe_end(store) == "all 2 trials were run (search.num_trials)"
    fewer = TrialStore(make_recipe(tmp_path / "s", num_trials=1), store.trials)
    assert not run_trial(SearchAlgorithm(fewer), 0.5) and fewer.state.end_reason == "num_trials"
    stopped = SearchAlgorithm(TrialStore(make_recipe(tmp_path / "t")), should_stop=lambda: True)
    assert not run_trial(stopped, 0.5) and stopped.end_reason == "interrupted"
