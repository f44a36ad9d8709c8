"""The search algorithm: Optuna through Ray Tune's OptunaSearch, with the recorded trials as its only state.

When a search starts, Optuna's study is rebuilt from the recorded trials. The point of trial n depends only on the seed,
n and the previous trials. A resumed search therefore tries the same points as an uninterrupted one, on any machine and
without pickled state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from dreamfleet.datasets.rng import key
from dreamfleet.trainers.config.search import Point, SearchConfig
from dreamfleet.tune.space import distributions, grid
from dreamfleet.tune.trial_store import Trial, TrialStore

STUDY = "dreamfleet"


class KeyedSampler(optuna.samplers.BaseSampler):
    """Samples each trial with a new sampler from ``make``, seeded by (seed, number of the trial)."""

    def __init__(self, make: Callable[[int], optuna.samplers.BaseSampler], seed: int):
        self.make, self.seed = make, seed
        self.current = make(seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Create the sampler of a trial."""
        self.current = self.make(key("proposal", self.seed, trial.number) % 2**32)
        self.current.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Delegate to the trial's sampler."""
        return self.current.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Delegate to the trial's sampler."""
        return self.current.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Delegate to the trial's sampler."""
        return self.current.sample_independent(study, trial, param_name, param_distribution)


class SearchAlgorithm(OptunaSearch):
    """Proposes trials to Ray Tune: first the interrupted ones, then the given points, then samples.

    When ``should_stop()`` is true it proposes no more; running trials continue to their end.
    """

    def __init__(self, store: TrialStore, *, should_stop: Callable[[], bool] = lambda: False):
        search = store.search
        self.store, self.should_stop = store, should_stop
        self.unfinished = [trial for trial in store.trials if not trial.is_over]
        planned = planned_points(search)
        self.total = search.num_trials or len(planned)
        if search.algorithm == "grid":
            self.total = min(self.total, len(planned))
        storage = optuna.storages.InMemoryStorage()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=storage, study_name=STUDY, direction="maximize" if search.maximise else "minimize"
        )
        for trial in store.trials:
            if trial.is_over:
                study.add_trial(_frozen(trial, search))
        for point in [trial.point for trial in self.unfinished] + planned[len(store.trials) :]:
            study.enqueue_trial(point)
        super().__init__(
            distributions(search),
            metric=search.metric,
            mode="max" if search.maximise else "min",
            sampler=KeyedSampler(_sampler(search, self.total), search.seed),
            storage=storage,
            study_name=STUDY,
        )

    @property
    def remaining(self) -> int:
        """The number of trials still to run, including interrupted ones."""
        return len(self.unfinished) + max(0, self.total - len(self.store.trials))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the arguments of the next trial's ``TrialRun``, or FINISHED."""
        if self.should_stop() or not self.remaining:
            return Searcher.FINISHED
        point = super().suggest(trial_id)
        trial = self.unfinished.pop(0) if self.unfinished else self.store.add(point)
        assert trial.point == point, "a study returns enqueued points in their order"
        last_step = trial.rounds[-1]["step"] if trial.rounds else -1
        return {"name": trial.name, "point": point, "last_step": last_step}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Ignore a round: Optuna would use it for pruning, which the scheduler does here."""

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the recorded trials are the state."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Tune pickles its search algorithm for its own resume feature, which is not used.
        return (object, ())


def planned_points(search: SearchConfig) -> list[Point]:
    """Return the points that are known in advance, in order."""
    return [*search.points_to_evaluate, *(grid(search) if search.algorithm == "grid" else [])]


def _sampler(search: SearchConfig, total: int) -> Callable[[int], optuna.samplers.BaseSampler]:
    if search.algorithm != "optuna":
        return lambda seed: optuna.samplers.RandomSampler(seed)
    # By default TPE samples the first ten trials at random, which can be all trials of a small search.
    startup = min(10, max(3, total // 3))
    return lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)


def _frozen(trial: Trial, search: SearchConfig) -> FrozenTrial:
    value = trial.figure(search.metric)
    return optuna.trial.create_trial(
        params=dict(trial.point),
        distributions=distributions(search),
        value=value,
        state=TrialState.FAIL if value is None else TrialState.COMPLETE,
    )
