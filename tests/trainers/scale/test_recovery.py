"""Tests checkpoint intervals and the effective training time: by hand, at their limits, and against a simulation."""

import math
import random
from functools import partial

import pytest

from dreamfleet.trainers.scale.recovery import (
    Costs,
    best_interval,
    daly_interval,
    effective_share,
    young_interval,
)

COSTS = Costs(save=10.0, background=0.0, restart=30.0, regroup=5.0)


def test_intervals_by_hand() -> None:
    assert young_interval(50.0, 10_000.0) == 1_000.0
    # 1000 (1 + sqrt(50 / 20000) / 3 + 50 / 20000 / 9) - 50
    assert daly_interval(50.0, 10_000.0) == pytest.approx(1_000 * (1 + 0.05 / 3 + 0.0025 / 9) - 50)
    assert daly_interval(200.0, 100.0) == 100.0  # saving takes longer than two failures
    assert daly_interval(1.0, math.inf) == math.inf
    assert daly_interval(1e-6, 1e4) == pytest.approx(young_interval(1e-6, 1e4), rel=1e-4)


def test_a_save_in_the_background_bounds_the_interval() -> None:
    assert best_interval(Costs(0.0, 60.0, 30.0, 5.0), 1e4) == 60.0
    assert best_interval(Costs(50.0, 60.0, 30.0, 5.0), 1e4) == daly_interval(50.0, 1e4)


def test_shares_by_hand() -> None:
    share = effective_share(100.0, COSTS, 1_000.0, regroups=False)
    assert share == pytest.approx(100 / (1_000 * math.exp(0.03) * (math.exp(0.11) - 1)))
    assert effective_share(100.0, COSTS, 1_000.0, regroups=True) == pytest.approx(
        100 / 110 * math.exp(-0.005)
    )
    late = Costs(10.0, 20.0, 30.0, 5.0)
    assert effective_share(100.0, late, 1e3, regroups=False) == pytest.approx(share * math.exp(-0.02))


def test_limits_of_the_share() -> None:
    for regroups in (False, True):
        share = partial(effective_share, costs=COSTS, regroups=regroups)
        assert share(100.0, failure_interval=math.inf) == pytest.approx(100 / 110)
        assert share(100.0, failure_interval=1e12) == pytest.approx(100 / 110)
        assert share(math.inf, failure_interval=math.inf) == 1.0
        assert share(100.0, failure_interval=0.1) < 1e-15
    assert (
        effective_share(math.inf, COSTS, 1e3, regroups=False) == 0.0
    )  # a run without checkpoints never ends


@pytest.mark.parametrize("failures", [400.0, 3_000.0, 50_000.0])
def test_dalys_interval_is_close_to_the_best(failures: float) -> None:
    share = partial(effective_share, costs=COSTS, failure_interval=failures, regroups=False)
    best = max(share(10 * 1.01**number) for number in range(1_000))
    assert share(daly_interval(COSTS.save, failures)) == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize(("failures", "interval"), [(300.0, 60.0), (1_000.0, 100.0)])
def test_a_simulated_run_has_the_expected_share(failures: float, interval: float) -> None:
    """A run whose failures are drawn, also those during saves and restarts."""
    source = random.Random(0)
    wall, segments = 0.0, 60_000
    for _ in range(segments):
        need = interval + COSTS.save
        while (until := source.expovariate(1 / failures)) < need:
            wall += until
            need = COSTS.restart + interval + COSTS.save  # a failure in the restart begins it again
        wall += need
    expected = effective_share(interval, COSTS, failures, regroups=False)
    # Daly's restarts are paid once per segment in the mean, as exp(R / M); the simulation pays one after each failure.
    assert segments * interval / wall == pytest.approx(expected, rel=0.04)
