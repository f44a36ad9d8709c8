"""The task source inside a worker's process."""

from __future__ import annotations

import pytest

from dreamfleet.trainers.packing.task import End, Task
from dreamfleet.tune.pool.remote_source import RemoteSource
from dreamfleet.tune.pool.worker import Ended, Event, Round, Started

ONE, TWO = Task("one", {}), Task("two", {})


def make_source() -> tuple[RemoteSource, list[Event]]:
    events: list[Event] = []
    return RemoteSource(events.append, lambda task, end: end.exit_reason == "completed"), events


def test_calls_of_the_runner_become_events() -> None:
    source, events = make_source()
    source.give(ONE)
    assert source.next_task() is ONE and not source.is_done
    source.on_start(ONE)
    source.on_round(ONE, {"step": 1})
    assert source.decision(ONE) is None
    source.answer("one", True)
    assert source.decision(ONE) is True and source.decision(ONE) is None, "an answer is for one round"
    source.on_end(ONE, End("stopped"))
    assert events == [Started("one"), Round("one", {"step": 1}), Ended("one", End("stopped"), False)]


def test_a_closed_source_ends_the_tasks_that_were_not_started() -> None:
    source, events = make_source()
    source.give(ONE)
    source.give(TWO)
    assert source.next_task() is ONE
    source.close()
    assert source.is_done and source.next_task() is None
    assert events == [Ended("two", End("interrupted"))]
    source.give(TWO)
    assert events[1:] == [Ended("two", End("interrupted"))], "given while the worker was being stopped"


def test_a_runner_with_running_tasks_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = make_source()
    source.give(ONE)
    source.next_task()
    waited: list[float] = []
    monkeypatch.setattr(source._changed, "wait", waited.append)
    assert source.next_task() is None
    source.give(TWO)
    source.next_task()
    source.on_round(ONE, {"step": 1})
    assert source.decision(ONE) is None, "the other task can go on"
    assert not waited
    source.on_round(TWO, {"step": 1})
    source.decision(ONE)
    assert waited
