"""Tests what a storm and a trial compute from the trace of their processes; no laboratory is started."""

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lab.trial import Trial


class FakeTrial(Trial):
    """A trial with a given trace: rank 0 takes steps 1 to 4 and dies; a process that replaces it takes steps 3 to 6."""

    def __init__(self) -> None:
        """Write the trace."""
        old = [
            {"event": "step", "rank": 0, "step": n, "t": 100.0 + n, "pid": 7, "on": "n1"}
            for n in (1, 2, 3, 4)
        ]
        new = [
            {"event": "step", "rank": 0, "step": n, "t": 105.0 + n, "pid": 9, "on": "n2"}
            for n in (3, 4, 5, 6)
        ]
        start: dict[str, Any] = {"event": "start", "rank": 0, "t": 106.5, "pid": 9, "on": "n2"}
        self.trace: Any = FakeTrace([*old, start, *new])
        self.struck, self.before = 104.5, 4


class FakeTrace:
    """A trace of given events."""

    def __init__(self, events: list[dict[str, Any]]):
        self.written = events

    def events(self) -> list[dict[str, Any]]:
        """Return the events."""
        return self.written

    def steps(self) -> list[dict[str, Any]]:
        """Return the steps."""
        return [event for event in self.written if event["event"] == "step"]


@pytest.fixture
def storm(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    spec = importlib.util.spec_from_file_location("storm", root / "benchmarks" / "storm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "storm", module)
    spec.loader.exec_module(module)
    return module


def test_a_fault_costs_a_restart_and_two_steps() -> None:
    assert FakeTrial().measure() == {"at_step": 4, "restart_s": 2.0, "new_step_s": 5.5, "repeated": 2}


def test_six_steps_of_a_second_counted_in_ten(storm: ModuleType) -> None:
    raging = storm.Storm(FakeTrial(), random.Random(0))
    raging.struck = [{"at_s": 3.5, "step": 4, "fault": "SIGKILL"}]
    figures = storm.measure_storm(raging, first=101.0, end=111.0)
    assert figures["steps"] == 6 and figures["steps_repeated"] == 2 and figures["median_step_s"] == 1.0
    assert figures["effective_training_time_traced"] == 0.6
    assert figures["faults"][0]["new_step_s"] == 5.5
    cut = storm.measure_storm(raging, first=101.0, end=108.0)  # the storm ends before the next new step
    assert cut["steps"] == 4 and cut["steps_repeated"] == 1 and cut["faults"][0]["new_step_s"] is None


def test_the_seed_decides_the_faults(storm: ModuleType) -> None:
    def drawn(seed: int) -> list[Any]:
        source = random.Random(seed)
        return [source.choice(storm.SINGLE) for _ in range(20)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert all(fault.__doc__ for fault in (*storm.SINGLE, *storm.PAIRS))
