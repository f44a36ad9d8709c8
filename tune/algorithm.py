"""Which point comes next: Optuna behind Ray Tune's OptunaSearch, without any state but the trials themselves.

The study is made anew from the trials each time a search starts, and the draw of trial n depends on the seed, n and the
trials so far alone. So a search goes on as if it had never stopped, on any machine and with nothing pickled in between.
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
    """Draws each trial with a sampler of its own, seeded by (seed, number of the trial)."""

    def __init__(self, make: Callable[[int], optuna.samplers.BaseSampler], seed: int):
        self.make, self.seed = make, seed
        self.own = make(seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Take a fresh sampler for the trial."""
        self.own = self.make(key("proposal", self.seed, trial.number) % 2**32)
        self.own.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Ask the trial's sampler."""
        return self.own.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Ask the trial's sampler."""
        return self.own.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Ask the trial's sampler."""
        return self.own.sample_independent(study, trial, param_name, param_distribution)


class SearchAlgorithm(OptunaSearch):
    """Gives Ray Tune a trial after the other: those that were interrupted, those that were asked for, then new draws.

    ``should_stop()`` ends the search: what runs then is left to end by itself.
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
                study.add_trial(_past(trial, search))
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
        """How many trials are still to be run, interrupted ones among them."""
        return len(self.unfinished) + max(0, self.total - len(self.store.trials))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial's ``name``, ``point`` and ``told`` (the step of its last round), or FINISHED."""
        if self.should_stop() or not self.remaining:
            return Searcher.FINISHED
        point = super().suggest(trial_id)
        trial = self.unfinished.pop(0) if self.unfinished else self.store.add(point)
        assert trial.point == point, "the study hands out what it was given, in that order"
        return {"name": trial.name, "point": point, "told": trial.rounds[-1]["step"] if trial.rounds else -1}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass over a round: Optuna would use it for pruning, which is the scheduler's part here."""

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the trials are the state."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Tune pickles what it is given, for a resume of its own that is not used here.
        return (object, ())


def planned_points(search: SearchConfig) -> list[Point]:
    """List the points that are known beforehand, in their order."""
    return [*search.points_to_evaluate, *(grid(search) if search.algorithm == "grid" else [])]


def _sampler(search: SearchConfig, total: int) -> Callable[[int], optuna.samplers.BaseSampler]:
    if search.algorithm != "optuna":
        return lambda seed: optuna.samplers.RandomSampler(seed)
    # Optuna draws ten at random before it learns, which would be all there is of a small search.
    startup = min(10, max(3, total // 3))
    return lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)


def _past(trial: Trial, search: SearchConfig) -> FrozenTrial:
    value = trial.figure(search.metric)
    return optuna.trial.create_trial(
        params=dict(trial.point),
        distributions=distributions(search),
        value=value,
        state=TrialState.FAIL if value is None else TrialState.COMPLETE,
    )
