"""Test where a worker that left is replaced; the replacement itself is tested on Ray (test_elastic_nodes.py)."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dreamfleet.trainers.driver import member_group
from dreamfleet.trainers.driver.member_group import AVOIDED_SECONDS, MemberGroup, Vacancy


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what Ray says: the state of the placement group, the node of its bundle, and the draining nodes."""
    known: dict[str, Any] = {"state": "CREATED", "bundles_to_node_id": {0: "node-a"}, "draining": {}}
    monkeypatch.setattr(member_group, "placement_group_table", lambda group: known)
    monkeypatch.setattr(member_group, "draining_nodes", lambda: known["draining"])
    return known


def has_place(vacancy: Vacancy) -> bool:
    return MemberGroup._has_place(object.__new__(MemberGroup), vacancy)


def vacate(*, avoided: str, seconds_ago: float = 0.0) -> Vacancy:
    group: Any = None
    return Vacancy(0, (group, 0), avoided=avoided, left=time.monotonic() - seconds_ago)


def test_a_dead_worker_is_replaced_where_it_was(placed: dict[str, Any]) -> None:
    assert has_place(vacate(avoided=""))
    placed["state"] = "RESCHEDULING"
    assert not has_place(vacate(avoided="")), "its node is lost, and Ray looks for another"


def test_the_node_of_a_worker_that_left_is_avoided_unless_it_lives_on(placed: dict[str, Any]) -> None:
    assert not has_place(vacate(avoided="node-a"))
    assert has_place(vacate(avoided="node-b")), "Ray has moved the bundle"
    late = AVOIDED_SECONDS + 1
    assert has_place(vacate(avoided="node-a", seconds_ago=late)), "only the process got SIGTERM"
    placed["draining"] = {"node-a": 0}
    assert not has_place(vacate(avoided="node-a", seconds_ago=late))
