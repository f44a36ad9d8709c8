"""How much each searched key mattered, by Optuna's PED-ANOVA, the density form of functional ANOVA (fANOVA)."""

from __future__ import annotations

import warnings

from dreamfleet.tune.space import distributions
from dreamfleet.tune.trial_store import TrialStore

# With fewer trials the wrong key is often first, whatever the method.
LEAST_TRIALS = 8
# The keys that separate the better half of the trials from all. Optuna's default, the best tenth, is one or two trials
# of a usual search: too few to tell a key that mattered from one that did not.
BETTER = 0.5


def importances(store: TrialStore, metric: str | None = None) -> dict[str, float]:
    """Return each searched key's share of the importance for a metric, largest first; the shares add up to 1.

    ``metric`` is the objective by default. {} for fewer than two keys that can vary, or fewer than ``LEAST_TRIALS``
    trials that measured the metric. Shares say nothing about the direction of an effect.

    Source: Watanabe, Bansal and Hutter, "PED-ANOVA" (IJCAI 2023), which needs no random forest and so no scikit-learn.
    """
    import optuna

    name = metric or store.search.objective
    domains = {path: one for path, one in distributions(store.search).items() if not one.single()}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if store.search.maximises(name) else "minimize")
    for trial in store.trials:
        if (value := trial.figure(name)) is not None:
            params = {path: trial.point[path] for path in domains}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=domains, value=value))
    if len(domains) < 2 or len(study.trials) < LEAST_TRIALS:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too few trials for a key: its share is 0
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=BETTER)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {path: float(share) for path, share in sorted(found.items(), key=lambda item: -item[1])}
