"""How many workers a pool has, and how many tasks each of them trains at once."""

from __future__ import annotations

from typing import Any

import pytest

from dreamfleet.datasets.errors import ResourceError
from dreamfleet.trainers.config.scaling import ScalingConfig
from dreamfleet.trainers.driver.failures import FailureBudget
from dreamfleet.tune.pool.retry import after_death
from dreamfleet.tune.pool.room import Demand, groups_that_fit, plan_room

TWO_CPUS, WITH_GPUS, BIG = {"CPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 64.0}
PACKED: dict[str, Any] = {"packs": True}


@pytest.mark.parametrize(
    ("machine", "demand", "resources", "threads", "groups", "slots"),
    [
        (TWO_CPUS, {}, {"CPU": 1}, 1, 2, 1),
        (TWO_CPUS, {"max_concurrent": 1}, {"CPU": 1}, 2, 1, 1),
        (TWO_CPUS, {"max_concurrent": 4}, {"CPU": 0.5}, 1, 4, 1),
        (TWO_CPUS, {"max_concurrent": 4, "tasks": 3}, {"CPU": 0.66}, 1, 3, 1),
        (TWO_CPUS, {"tasks": 1}, {"CPU": 1}, 2, 1, 1),
        (TWO_CPUS, {"tasks": 9}, {"CPU": 1}, 1, 2, 1),
        (TWO_CPUS, {"resources": {"CPU": 0.5}}, {"CPU": 0.5}, 1, 4, 1),
        (TWO_CPUS, {"tasks": 1000, **PACKED}, {"CPU": 1}, 1, 2, 8),
        (TWO_CPUS, {"tasks": 6, **PACKED}, {"CPU": 1}, 1, 2, 3),
        (TWO_CPUS, {"max_concurrent": 4, **PACKED}, {"CPU": 1}, 1, 2, 2),
        (TWO_CPUS, {"max_concurrent": 1, **PACKED}, {"CPU": 1}, 2, 1, 1),
        (BIG, {"tasks": 16, **PACKED}, {"CPU": 3}, 4, 16, 1),
        (WITH_GPUS, {}, {"CPU": 1, "GPU": 1}, 8, 2, 1),
        (WITH_GPUS, {"resources": {"CPU": 2, "GPU": 0.5}}, {"CPU": 2, "GPU": 0.5}, 2, 4, 1),
        (WITH_GPUS, {"max_concurrent": 1}, {"CPU": 1, "GPU": 1}, 8, 1, 1),
        (WITH_GPUS, PACKED, {"CPU": 1, "GPU": 1}, 8, 2, 32),
        (WITH_GPUS, {"tasks": 40, **PACKED}, {"CPU": 1, "GPU": 1}, 8, 2, 20),
        (WITH_GPUS, {"workers_per_task": 2}, {"CPU": 1, "GPU": 1}, 4, 1, 1),
        (BIG, {"workers_per_task": 4, "tasks": 2}, {"CPU": 7}, 8, 2, 1),
        (BIG, {"workers_per_task": 4, **PACKED, "tasks": 2}, {"CPU": 7}, 8, 2, 1),
    ],
)
def test_resources_workers_and_slots(
    machine: dict[str, float],
    demand: dict[str, Any],
    resources: dict[str, float],
    threads: int,
    groups: int,
    slots: int,
) -> None:
    room = plan_room(Demand(ScalingConfig(), **demand), [machine])
    assert (room.share.resources, room.share.threads, room.groups, room.slots) == (
        resources,
        threads,
        groups,
        slots,
    )


def test_slots_per_worker_overrides_the_default() -> None:
    for wanted in (1, 3):
        scaling = ScalingConfig(slots_per_worker=wanted)
        assert plan_room(Demand(scaling, packs=True), [TWO_CPUS]).slots == wanted


def test_a_growing_cluster_counts_the_machines_that_it_may_have() -> None:
    room = plan_room(Demand(ScalingConfig()), [TWO_CPUS], limit={"CPU": 32.0, "GPU": 4.0})
    assert room.groups == 4 and room.share.uses_gpu


def test_a_task_that_fits_on_no_machine_is_an_error() -> None:
    for demand in (
        Demand(ScalingConfig(), resources={"CPU": 3}),
        Demand(ScalingConfig(), workers_per_task=3, resources={"CPU": 2}),
    ):
        with pytest.raises(ResourceError, match=r"[23] CPU .*search\.resources_per_trial"):
            plan_room(demand, [TWO_CPUS, TWO_CPUS])


def test_groups_follow_the_placement_strategy() -> None:
    machines = [{"CPU": 4.0}, {"CPU": 2.0}, {"CPU": 1.0}]
    found = {
        strategy: groups_that_fit({"CPU": 1}, machines, 3, strategy)
        for strategy in ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
    }
    assert found == {"PACK": 2, "SPREAD": 2, "STRICT_PACK": 1, "STRICT_SPREAD": 1}


@pytest.mark.parametrize(
    ("max_failures", "fates"),
    [
        (0, ["failed"]),
        (1, ["alone", "failed"]),
        (3, ["again", "alone", "alone", "failed"]),
        (-1, ["again", "alone", "alone", "alone"]),
    ],
)
def test_a_task_whose_process_died_gets_a_limited_number_of_restarts(
    max_failures: int, fates: list[str]
) -> None:
    budget = FailureBudget(max_failures)
    assert [after_death(budget, deaths + 1) for deaths in range(len(fates))] == fates


def test_new_checkpoints_and_preemptions_leave_a_task_its_restarts() -> None:
    budget = FailureBudget(1)
    assert [after_death(budget, deaths, saved=10 * deaths) for deaths in (1, 2, 3)] == ["alone"] * 3
    assert after_death(budget, 3, saved=30, preempted=True) == "again"
    assert after_death(budget, 4, saved=30) == "failed"
