"""How much of a run's time its failures and checkpoints cost, and how often to save."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Seconds that checkpoints and failures cost.

    ``save``: training stands still for one checkpoint; ``background``: from its copy until it is complete, while
    training goes on. ``restart``: from a failure to the next step, when all workers start again from a checkpoint;
    ``regroup``: the same when the survivors keep their state and nothing is repeated.
    """

    save: float
    background: float
    restart: float
    regroup: float


def young_interval(save: float, failure_interval: float) -> float:
    """Return the seconds of training between two checkpoints, sqrt(2 d M): Young 1974, Commun. ACM 17(9)."""
    return math.sqrt(2 * save * failure_interval)


def daly_interval(save: float, failure_interval: float) -> float:
    """Return Daly's higher-order estimate: Daly 2006, Future Gener. Comput. Syst. 22(3), equation 37."""
    if math.isinf(failure_interval):
        return math.inf
    if save >= 2 * failure_interval:
        return failure_interval
    ratio = save / (2 * failure_interval)
    return young_interval(save, failure_interval) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def effective_share(interval: float, costs: Costs, failure_interval: float, *, regroups: bool) -> float:
    """Return the effective training time: seconds of steps that counted, over wall time, as an expectation.

    ``interval``: seconds of training between two checkpoints. Failures are exponential with mean ``failure_interval``.
    Without ``regroups`` each one repeats the steps since the last complete checkpoint and costs ``restart``: Daly 2006,
    equation 20, with the background seconds of a save added to the restart, since its steps are not safe before. With
    ``regroups`` a failure costs ``regroup`` alone, during which another failure may strike.
    """
    saved = interval / (interval + costs.save) if math.isfinite(interval) else 1.0
    if math.isinf(failure_interval):
        return saved
    if regroups:
        return saved * math.exp(-costs.regroup / failure_interval)
    if math.isinf(interval):
        return 0.0
    period = (interval + costs.save) / failure_interval
    if period > 700:  # beyond floats: such a run never ends
        return 0.0
    lost = math.exp(-(costs.restart + costs.background) / failure_interval)
    return interval / failure_interval / math.expm1(period) * lost


def best_interval(costs: Costs, failure_interval: float) -> float:
    """Return Daly's interval, but not below the background seconds of a save, as one save is in flight at a time."""
    return max(daly_interval(costs.save, failure_interval), costs.background)
