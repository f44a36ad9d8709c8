"""What a search has cost, and what stopping trials early has saved."""

from __future__ import annotations

import statistics

from dreamfleet.trainers.report import formatting
from dreamfleet.tune.trial_store import Trial, TrialStore

STEPS = "train.max_train_steps"


def cost(store: TrialStore) -> list[tuple[str, str]]:
    """Return (name, value) of each figure of the cost; [] before any trial has run."""
    ran = [trial for trial in store.trials if trial.seconds]
    if not ran:
        return []
    seconds = sum(trial.seconds for trial in ran)
    rows = [("time of all trials", formatting.seconds(seconds))]
    rows.append(("one trial (median)", formatting.seconds(statistics.median(trial.seconds for trial in ran))))
    if store.elapsed:
        rows.append(("the whole search", formatting.seconds(store.elapsed)))
    if gpu := store.gpu_seconds:
        rows.append(("GPU hours", formatting.number(gpu / 3600)))
    steps = sum(trial.steps for trial in ran)
    rows.append(("optimizer steps", formatting.number(steps)))
    stopped = [trial for trial in ran if trial.status == "stopped" and trial.steps]
    if saved := sum(_steps_left(store, trial) for trial in stopped):
        share = formatting.share(saved / (saved + steps))
        rows.append(("optimizer steps saved by stopping early", f"{formatting.number(saved)} ({share})"))
        time = sum(_steps_left(store, trial) * trial.seconds / trial.steps for trial in stopped)
        rows.append(("time that they would have taken (estimate)", formatting.seconds(time)))
    if freed := store.state.freed_bytes:
        rows.append(("disk space freed by removing checkpoints", formatting.size(freed)))
    return rows


def _steps_left(store: TrialStore, trial: Trial) -> int:
    planned = trial.point.get(STEPS, store.recipe.train.max_train_steps)
    return max(0, int(planned or 0) - trial.steps)
