"""The scheduler that stops lagging trials: Ray Tune's ASHA, told of the trials from before an interruption."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from dreamfleet.tune.ledger import Ledger

NO_END = 10**9  # where only the number of epochs is known


def make_scheduler(ledger: Ledger) -> Any:
    """Return the scheduler that the search asks for; ASHA measures time in optimizer steps."""
    recipe, search = ledger.recipe, ledger.search
    if search.scheduler == "none":
        return FIFOScheduler()
    steps = recipe.train.max_train_steps or NO_END
    asha = ASHAScheduler(
        time_attr="step",
        metric=search.metric,
        mode="max" if search.maximise else "min",
        grace_period=min(search.grace_period or recipe.validation.steps, steps),
        reduction_factor=search.reduction_factor,
        # A trial that has come to its end ends by itself, with its artefacts written.
        max_t=steps + 1,
    )
    for trial in ledger.trials:
        if trial.is_over and trial.rounds:
            before = SimpleNamespace(trial_id=f"before-{trial.name}")
            asha.on_trial_add(None, before)
            for figures in trial.rounds:
                asha.on_trial_result(None, before, figures)
    return asha
