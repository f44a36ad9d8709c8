"""Tests of a run's progress: what counts as time of a step, phases, and the reports."""

from __future__ import annotations

from typing import Any

import numpy as np

from dreamfleet.trainers.distributed import pulse as module
from dreamfleet.trainers.distributed.pulse import NEW_SHAPE, START, STEP, Pulse


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make() -> tuple[Pulse, Clock]:
    clock = Clock()
    return Pulse(clock), clock


def step(pulse: Pulse, clock: Clock, seconds: float, done: int, size: int = 8) -> None:
    pulse.mark("data")
    pulse.begin_pass({"latents": np.zeros((1, size)), "num_instances": 1}, last=True)
    clock.now += seconds
    pulse.mark("reduce")
    pulse.finish_step(done)


def test_the_first_step_new_shapes_and_phases_do_not_count_as_slow_steps() -> None:
    pulse, clock = make()
    pulse.resume(10)
    step(pulse, clock, 30.0, 11)
    assert pulse.beat().slowest is None and pulse.beat().step == 11 and pulse.beat().saved == 10
    step(pulse, clock, 1.0, 12)
    step(pulse, clock, 20.0, 13, size=16)
    with pulse.during("save"):
        clock.now += 50
    step(pulse, clock, 2.0, 14)
    assert pulse.beat().slowest == 2.0


def test_a_beat_tells_phase_stage_and_the_seconds_since_the_last_progress() -> None:
    pulse, clock = make()
    assert pulse.beat().phase == START
    step(pulse, clock, 1.0, 1)
    pulse.begin_pass({"latents": np.zeros((1, 99))}, last=False)
    assert (pulse.beat().phase, pulse.beat().stage) == (NEW_SHAPE, "pass")
    pulse.finish_step(2)
    with pulse.during("save"):
        clock.now += 4
        assert (pulse.beat().phase, pulse.beat().seconds) == ("save", 4)
    assert (pulse.beat().phase, pulse.beat().seconds) == (STEP, 0)


def test_steps_are_reported_before_each_phase_and_regularly() -> None:
    pulse, clock = make()
    seen: list[Any] = []
    pulse.on_steps = lambda *what: seen.append(what)
    pulse.on_phase = lambda *what: seen.append(what)
    for done in (1, 2, 3):
        step(pulse, clock, 1.0, done)
    with pulse.during("evaluation"):
        clock.now += 5
    assert seen == [(3, 3, 3.0), ("evaluation", 3, 5.0)]
    step(pulse, clock, 1.0, 4)
    clock.now += module.SECONDS_BETWEEN_REPORTS
    pulse.finish_step(5)
    assert seen[2:] == [(5, 2, 1.0 + module.SECONDS_BETWEEN_REPORTS)]


def test_a_notice_has_an_end() -> None:
    assert module.Notice("drained", since=0.0).seconds_left is None
    left = module.Notice("drained", since=0.0, seconds=1.0).seconds_left
    assert left is not None and left < 0
