"""Decides when a search ends: by its number of trials, its time, its GPU time, or trials without improvement."""

from __future__ import annotations

from dreamfleet.trainers.report import formatting
from dreamfleet.tune.trial_store import Trial, TrialStore, dominates

# Reason of the end -> a sentence with the values of :func:`describe_end`.
END_REASONS = {
    "num_trials": "all {trials} trials were run (search.num_trials)",
    "exhausted": "all points of the search space were tried ({trials} trials)",
    "patience": "{patience} trials in a row improved nothing (search.patience)",
    "max_hours": "{elapsed} are used up (search.max_hours: {max_hours})",
    "max_gpu_hours": "{gpu} of GPU time are used up (search.max_gpu_hours: {max_gpu_hours})",
    "interrupted": "the search was interrupted",
    "failed": "the first trials failed with an error that every trial would raise",
}


def used_up(store: TrialStore) -> str | None:
    """Return the budget in hours that is used up, so that running trials stop as well; None if none is."""
    search = store.search
    if search.max_hours is not None and store.elapsed >= 3600 * search.max_hours:
        return "max_hours"
    if search.max_gpu_hours is not None and store.gpu_seconds >= 3600 * search.max_gpu_hours:
        return "max_gpu_hours"
    return None


def out_of_patience(store: TrialStore) -> bool:
    """Return whether the last ``search.patience`` trials that ended improved nothing."""
    patience = store.search.patience
    return patience is not None and trials_without_improvement(store) >= patience


def trials_without_improvement(store: TrialStore) -> int:
    """Return how many trials ended after the last that improved a result, in the order of their ends.

    A trial improves a result if no trial before it is at least as good in all metrics. Failed trials improve nothing.
    """
    best: list[tuple[float, ...]] = []
    since = 0
    for trial in sorted((trial for trial in store.trials if trial.is_over), key=_order):
        losses = store.losses(trial) if trial.status != "failed" else None
        is_better = losses is not None and not any(
            other == losses or dominates(other, losses) for other in best
        )
        since = 0 if is_better else since + 1
        if losses is not None:
            best.append(losses)
    return since


def describe_end(store: TrialStore) -> str:
    """Return a sentence on why the search ended; "" while it runs."""
    search, reason = store.search, store.state.end_reason
    if reason is None:
        return ""
    return END_REASONS[reason].format(
        trials=len(store.trials),
        patience=search.patience,
        elapsed=formatting.seconds(store.elapsed),
        gpu=formatting.seconds(store.gpu_seconds),
        max_hours=search.max_hours,
        max_gpu_hours=search.max_gpu_hours,
    )


def _order(trial: Trial) -> tuple[int, str]:
    return trial.ended or 0, trial.name
