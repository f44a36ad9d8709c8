"""Tests of the timeline of a run: what counts as effective training time, and what a failure cost."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dreamfleet.trainers.report.timeline import Timeline, read_timeline

ZERO = datetime(2026, 1, 1, tzinfo=UTC)


def event(second: float, kind: str, step: int | None = None, **details: Any) -> dict[str, Any]:
    at = (ZERO + timedelta(seconds=second)).isoformat()
    return {"at": at, "kind": kind, **({} if step is None else {"step": step}), **details}


def steps(second: float, step: int, count: int, seconds: float) -> dict[str, Any]:
    return event(second, "steps", step, count=count, seconds=seconds)


def read(*events: dict[str, Any]) -> Timeline:
    found = read_timeline(events)
    assert found is not None
    return found


START = [event(10, "start", 0, seconds=10.0), event(20, "ready", 0)]


def test_an_undisturbed_run() -> None:
    line = read(
        *START,
        steps(40, 20, 20, 20.0),
        event(41, "save", 20, seconds=1.0),
        steps(61, 40, 20, 20.0),
        event(62, "save", 40, seconds=1.0),
        event(70, "evaluation", 40, seconds=8.0),
        event(80, "end", 40, reason="completed"),
    )
    assert line.seconds == 80
    assert line.parts == {"train": 40, "save": 2, "evaluation": 8, "start_up": 20, "lost": 0, "other": 10}
    assert line.effective == 0.5 and not line.incidents and line.steps_repeated == 0
    assert line.steps == [(20, 0), (40, 20), (61, 40)]


def test_steps_after_the_checkpoint_and_the_time_until_the_restart_are_lost() -> None:
    line = read(
        *START,
        steps(40, 20, 20, 20.0),
        event(41, "save", 20, seconds=1.0),
        steps(46, 25, 5, 5.0),
        event(50, "failure", 25, cause="died", rank=1, node="10.0.0.2", action="again"),
        event(54, "start", 20, seconds=9.0),
        event(58, "ready", 20),
        steps(78, 40, 20, 20.0),
        event(78, "end", 40),
    )
    assert line.parts["train"] == 40 and line.parts["lost"] == 5 + 12 and line.parts["start_up"] == 20
    (incident,) = line.incidents
    assert (incident.cause, incident.rank, incident.node, incident.step) == ("died", 1, "10.0.0.2", 25)
    assert (incident.at, incident.steps_repeated, incident.seconds_lost) == (50, 5, 17)
    assert line.effective == pytest.approx(40 / 78)


def test_a_chunk_of_steps_that_spans_the_checkpoint_counts_in_part() -> None:
    line = read(
        *START,
        steps(40, 20, 20, 20.0),
        event(44, "failure", 20, cause="died", action="again"),
        event(45, "start", 15),
        event(50, "ready", 15),
        steps(75, 40, 25, 25.0),
        event(75, "end", 40),
    )
    assert line.parts["train"] == 40 and line.parts["lost"] == 5 + 10


def test_a_pause_between_an_end_and_a_resume_does_not_count_and_a_killed_driver_does() -> None:
    first = [*START, steps(40, 20, 20, 20.0), event(40, "end", 20, reason="interrupted")]
    resumed = read(
        *first,
        event(1010, "start", 20, seconds=10.0),
        event(1015, "ready", 20),
        steps(1035, 40, 20, 20.0),
        event(1035, "end", 40),
    )
    assert resumed.seconds == 75 and resumed.parts["start_up"] == 35 and not resumed.incidents
    killed = read(
        *first[:-1],
        event(1010, "start", 20, seconds=10.0),
        event(1015, "ready", 20),
        steps(1035, 40, 20, 20.0),
        event(1035, "end", 40),
    )
    assert killed.seconds == 1035 and killed.parts["lost"] == 975
    assert [one.cause for one in killed.incidents] == ["driver or controller lost"]


def test_an_end_by_failure_starts_a_pause_too() -> None:
    line = read(
        *START,
        steps(40, 20, 20, 20.0),
        event(42, "failure", 20, cause="error", action="end", error="ValueError"),
        event(500, "start", 20, seconds=5.0),
        event(505, "ready", 20),
        event(510, "end", 20),
    )
    assert line.seconds == 42 + 5 + 10
    assert [(one.cause, one.error) for one in line.incidents] == [("error", "ValueError")]


def test_a_regroup_repeats_no_step() -> None:
    line = read(
        *START,
        steps(40, 20, 20, 20.0),
        event(41, "failure", 20, cause="died", rank=1, action="again"),
        event(43, "regroup", 20, seconds=3.0, world=1, cause="died"),
        steps(63, 40, 20, 20.0),
        event(63, "end", 40),
    )
    (incident,) = line.incidents
    assert (incident.cause, incident.steps_repeated, incident.seconds_lost) == ("died", 0, 3.0)
    assert line.parts["lost"] == 3 and line.parts["train"] == 40


def test_a_start_that_fails_and_a_run_in_progress() -> None:
    assert read_timeline([]) is None
    assert read_timeline([event(1, "failure", cause="died")]) is None
    line = read(event(10, "start", 0, seconds=10.0), event(15, "failure", cause="died", action="again"))
    assert line.seconds == 15 and line.effective == 0 and line.parts["start_up"] == 15


def test_the_summary_is_plain_and_short() -> None:
    many = [steps(20 + n, n, 1, 1.0) for n in range(1, 5001)]
    summary = read(*START, *many, event(5020, "end", 5000)).summary()
    assert len(summary["steps"]) <= 502 and summary["steps"][-1] == [5020, 5000]
    assert summary["effective_training_time"] == pytest.approx(5000 / 5020)
