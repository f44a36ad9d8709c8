"""The search algorithm: Optuna's samplers, with the recorded trials as their only state.

Every point is a function of the recorded trials: Optuna's study is rebuilt from them for each proposal, and the sampler
is seeded by (seed, number of the trial). A resumed search therefore tries the same points as an uninterrupted one, on
any machine and without pickled state. A point that was tried is not proposed again, since results are deterministic.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import optuna
from optuna.trial import TrialState

from dreamfleet.datasets.rng import key
from dreamfleet.trainers.config.search import Point, SearchConfig
from dreamfleet.tune.limits import out_of_patience, used_up
from dreamfleet.tune.space import canonical, distributions, grid, identity, untried
from dreamfleet.tune.trial_store import Trial, TrialStore

ATTEMPTS = 20  # samples that may be points tried before, until an untried point is drawn evenly
MAX_LISTED = 100_000  # points of a finite space that are listed to find the untried ones


class SearchAlgorithm:
    """Proposes trials: first the interrupted ones, then the given points, then samples.

    When ``should_stop()`` is true it proposes no more; running trials continue to their end. ``end_reason``: why it
    proposes no more, a key of ``limits.END_REASONS``; None before.
    """

    def __init__(self, store: TrialStore, *, should_stop: Callable[[], bool] = lambda: False):
        self.store, self.should_stop = store, should_stop
        self.unfinished = [trial for trial in store.trials if not trial.is_over]
        self.planned = planned_points(store.search)
        store.state.end_reason = None

    @property
    def total(self) -> int | None:
        """The number of trials of the whole search, unless patience or hours end it before; None if unknown."""
        search = self.store.search
        possible = len(self.planned) if search.algorithm == "grid" else search.size
        return min((number for number in (search.num_trials, possible) if number is not None), default=None)

    @property
    def remaining(self) -> int | None:
        """The number of trials still to run, including interrupted ones; None if unknown."""
        if self.total is None:
            return None
        return len(self.unfinished) + max(0, self.total - len(self.store.trials))

    @property
    def end_reason(self) -> str | None:
        """Why no more trials are proposed, as recorded; None if the search goes on."""
        return self.store.state.end_reason

    @property
    def interrupts(self) -> bool:
        """Whether a budget in hours is used up, so that running trials save a checkpoint and stop."""
        return used_up(self.store) is not None

    def suggest(self) -> Trial | None:
        """Return the next trial; None if no more is proposed, for the reason in :attr:`end_reason`."""
        store, state = self.store, self.store.state
        state.end_reason = "interrupted" if self.should_stop() else used_up(store)
        if state.end_reason is None and self.unfinished:
            return self.unfinished.pop(0)
        if state.end_reason is None and out_of_patience(store):
            state.end_reason = "patience"
        limit = store.search.num_trials
        if state.end_reason is None and limit is not None and len(store.trials) >= limit:
            state.end_reason = "num_trials"
        point = None if state.end_reason else self._next_point()
        if point is not None:
            return store.add(point)
        state.end_reason = state.end_reason or "exhausted"
        return None

    def _next_point(self) -> Point | None:
        number = len(self.store.trials)
        if number < len(self.planned):
            return self.planned[number]
        return None if self.store.search.algorithm == "grid" else propose(self.store, self.total)


def planned_points(search: SearchConfig) -> list[Point]:
    """Return the points that are known in advance, in order, each once."""
    points = [*search.points_to_evaluate, *(grid(search) if search.algorithm == "grid" else [])]
    return list({identity(point): point for point in (canonical(search, point) for point in points)}.values())


def propose(store: TrialStore, total: int | None = None) -> Point | None:
    """Return an untried point, a function of the recorded trials; None if every point was tried.

    ``total``: the number of trials of the whole search, a third of which (at most 10) are sampled before TPE uses
    results.
    """
    search, number = store.search, len(store.trials)
    tried = {identity(trial.point) for trial in store.trials}
    if search.size is not None and len(tried) >= search.size:
        return None
    study, space = _study(store), distributions(search)
    for attempt in range(ATTEMPTS):
        study.sampler = _sampler(search, total, key("proposal", search.seed, number, attempt) % 2**32)
        asked = study.ask(space)
        study.tell(asked, state=TrialState.FAIL)  # samplers ignore it; the recorded trials are the study
        if identity(asked.params) not in tried:
            return {path: asked.params[path] for path in search.space}
    if search.size is None or search.size > MAX_LISTED:
        return None
    return random.Random(key("untried", search.seed, number)).choice(untried(search, tried))


def _sampler(search: SearchConfig, total: int | None, seed: int) -> optuna.samplers.BaseSampler:
    if search.algorithm != "optuna":
        return optuna.samplers.RandomSampler(seed)
    # By default TPE samples the first ten trials at random, which can be all trials of a small search.
    startup = 10 if total is None else min(10, max(3, total // 3))
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)


def _study(store: TrialStore) -> optuna.Study:
    """Return a study of the earlier searches' trials, then of the recorded trials in the order of their starts.

    TPE treats trials that have not ended as bad ones, so that concurrent trials are not close together. Trials that
    ended without a result are left out.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search, space = store.search, distributions(store.search)
    maximise, minimise = optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
    study = optuna.create_study(
        directions=[maximise if search.maximises(metric) else minimise for metric in search.metrics]
    )

    def add(point: Point, values: Sequence[float | None] | None) -> None:
        state = TrialState.RUNNING if values is None else TrialState.COMPLETE
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(point),
                distributions=space,
                values=None if values is None else [value for value in values if value is not None],
                state=state,
            )
        )

    for earlier in store.state.earlier:
        add(earlier.point, [earlier.figures[metric] for metric in search.metrics])
    for trial in store.trials:
        values = [trial.figure(metric) for metric in search.metrics] if trial.is_over else None
        if values is None or None not in values:
            add(trial.point, values)
    return study
