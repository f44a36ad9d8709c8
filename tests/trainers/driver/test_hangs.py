"""Tests of the detection of hangs from the progress of several workers."""

from __future__ import annotations

import pytest

from dreamfleet.trainers.distributed.pulse import END, NEW_SHAPE, START, STEP, Beat
from dreamfleet.trainers.driver.hangs import Hang, Heard, find_hang

NOW = 1000.0


def beat(
    seconds: float, *, step: int = 5, phase: str = STEP, stage: str = "pass", slowest: float | None = 1.0
) -> Beat:
    return Beat(step, phase, stage, seconds, slowest)


def ranks(*beats: Beat | None, ages: tuple[float, ...] = (), timeout: float | None = None) -> Hang | None:
    times = [*ages, *[1.0] * len(beats)]
    heard = {rank: Heard(one, NOW - times[rank]) for rank, one in enumerate(beats)}
    return find_hang(heard, NOW, timeout)


def test_a_step_hangs_after_ten_times_the_slowest_one_and_a_minute() -> None:
    assert ranks(beat(59), beat(59)) is None
    assert ranks(beat(61), beat(61)) is not None
    assert ranks(beat(199, slowest=20), beat(199)) is None
    assert ranks(beat(201, slowest=20), beat(201)) is not None
    assert ranks(beat(9), beat(9), timeout=8) is not None


@pytest.mark.parametrize("phase", [START, NEW_SHAPE, "save", "evaluation", END])
def test_other_phases_may_take_long_and_the_others_wait_for_them(phase: str) -> None:
    assert ranks(beat(5000, phase=phase), beat(5000, stage="reduce")) is None


def test_a_process_that_does_not_answer_hangs_in_every_phase() -> None:
    found = ranks(beat(1, phase="save"), beat(1), ages=(61.0, 1.0))
    assert found == Hang((0,), 61.0, silent=True)
    assert ranks(None, beat(1, slowest=None), ages=(599.0, 599.0)) is None
    assert ranks(None, beat(1, slowest=None), ages=(601.0, 1.0)) == Hang((0,), 601.0, silent=True)


@pytest.mark.parametrize(
    ("beats", "causes"),
    [
        ([beat(70, stage="data"), beat(70, stage="reduce")], (0,)),
        ([beat(70, stage="last pass"), beat(70, stage="pass")], (1,)),
        ([beat(70, stage="reduce"), beat(70, stage="last pass")], (0, 1)),
        ([beat(70, step=6, stage="data"), beat(70, step=5, stage="reduce")], (1,)),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(beats: list[Beat], causes: tuple[int, ...]) -> None:
    found = ranks(*beats)
    assert found is not None and found.ranks == causes and not found.silent
