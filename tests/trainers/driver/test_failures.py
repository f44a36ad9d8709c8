"""Tests of the decision after a failure, with sequences of failures."""

from __future__ import annotations

from typing import Any

import pytest

from dreamfleet.trainers.driver.failures import Decision, Failure, FailureBudget


def died(step: int | None, saved: int | None = None) -> Failure:
    return Failure("died", "killed by signal 9", step=step, saved=saved, rank=1)


def raised(text: str, step: int | None, saved: int | None = None) -> Failure:
    return Failure("error", text, step=step, saved=saved, rank=0)


def lost(step: int, saved: int | None = None) -> Failure:
    return Failure("preempted", "node drained", step=step, saved=saved)


def memory(step: int, saved: int | None = None) -> Failure:
    return Failure("memory", "killed for lack of memory", step=step, saved=saved)


AGAIN, END = "again", "end"


@pytest.mark.parametrize(
    ("max_failures", "failures", "actions"),
    [
        pytest.param(1, [died(12, 10), died(14, 10)], [AGAIN, END], id="two without a new checkpoint"),
        pytest.param(
            1, [died(12, 10), died(24, 20), died(36, 30)], [AGAIN] * 3, id="each after a new checkpoint"
        ),
        pytest.param(0, [died(3)], [END], id="none is allowed"),
        pytest.param(-1, [died(3)] * 50, [AGAIN] * 50, id="no limit"),
        pytest.param(1, [lost(3)] * 20 + [died(3), died(3)], [AGAIN] * 21 + [END], id="preemptions are free"),
        pytest.param(1, [died(12, 10), died(8, 5)], [AGAIN, END], id="an older checkpoint is no progress"),
        pytest.param(1, [died(None), died(2, None), died(12, 10)], [AGAIN, END, AGAIN], id="counts anew"),
        pytest.param(5, [raised("KeyError: 'a'", 7)] * 2, [AGAIN, END], id="the same error at the same step"),
        pytest.param(
            5, [raised("KeyError: 'a'", None)] * 2, [AGAIN, END], id="the same error while starting"
        ),
        pytest.param(
            5,
            [raised("RuntimeError: 12 of 7f at 0x7f", 7, 5), raised("RuntimeError: 8 of 7f at 0x9a", 7, 5)],
            [AGAIN, END],
            id="numbers and addresses vary",
        ),
        pytest.param(
            5,
            [raised("OSError: x", 7), raised("OSError: x", 8), died(7), died(7)],
            [AGAIN] * 4,
            id="another step",
        ),
        pytest.param(5, [raised("OSError: x", 7), raised("OSError: y", 7)], [AGAIN] * 2, id="another error"),
        pytest.param(
            5, [raised("E: x", 7, 5), died(7, 5), raised("E: x", 7, 5)], [AGAIN, AGAIN, END], id="with others"
        ),
        pytest.param(-1, [memory(7, 5), memory(9, 5)], [AGAIN, END], id="out of memory"),
        pytest.param(-1, [memory(7, 5), memory(19, 15)], [AGAIN] * 2, id="out of memory, with progress"),
        pytest.param(9, [Failure("mistake", "no such image")], [END], id="a mistake is not repeated"),
        pytest.param(9, [Failure("hung", "no progress", step=3)] * 3, [AGAIN] * 3, id="a hang is no error"),
    ],
)
def test_sequences(max_failures: int, failures: list[Failure], actions: list[str]) -> None:
    budget = FailureBudget(max_failures)
    assert [budget.see(failure).action for failure in failures] == actions


def end_of(max_failures: int, *failures: Failure) -> Decision:
    budget = FailureBudget(max_failures)
    return [budget.see(failure) for failure in failures][-1]


@pytest.mark.parametrize(
    ("decision", "words"),
    [
        (
            end_of(1, died(12, 10), died(14, 10)),
            ["2 times", "checkpoint of step 10", "max_failures 1", "signal 9"],
        ),
        (end_of(0, died(3)), ["once", "without a checkpoint", "--resume"]),
        (end_of(3, raised("E: x", 7), raised("E: x", 7)), ["twice after step 7", "E: x", "Fix the cause"]),
        (end_of(3, memory(7), memory(7)), ["twice", "train_batch_size"]),
    ],
)
def test_the_end_is_explained(decision: Any, words: list[str]) -> None:
    assert all(word in decision.reason for word in words), decision.reason
