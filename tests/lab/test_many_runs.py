"""Tests what must come of the runs of a fleet, from the trace of their processes; no laboratory is started."""

from typing import Any

import pytest
from lab.many import FLEET, LONG, SHORT, each_run_once
from lab.trial import EVERY, Trial


class FakeTrial(Trial):
    """A fleet of a finished run `short` and a run `long` that was killed at step 15 and went on from step 10."""

    def __init__(self, *more: tuple[str, int], status: str = "completed"):
        """Write the trace, with ``more`` executions of steps by run."""
        taken = [("short", step) for step in range(1, SHORT + 1)]
        taken += [("long", step) for step in (*range(1, 16), *range(11, LONG + 1))]
        self.lab: Any = self
        self.trace: Any = self
        self.url, self.command, self.finished = "s3://lab/fleet", FLEET, {"short"}
        self.taken, self.status = [*taken, *more], status

    def steps(self) -> list[dict[str, Any]]:
        """Return the events of steps."""
        return [{"run": run, "step": step} for run, step in self.taken]

    def ask(self, question: str, url: str) -> dict[str, str]:
        """Return the statuses in the fleet's table."""
        assert (question, url) == ("statuses", "s3://lab/fleet/fleet.parquet")
        return {"short": "completed", "long": self.status}


def test_a_run_that_repeats_half_an_interval_is_as_expected() -> None:
    each_run_once(FakeTrial())
    assert FakeTrial().repeated() == 5, "equal numbers of other runs are no repetitions"


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        (FakeTrial(("short", SHORT)), "short repeated 1 steps"),
        (FakeTrial(*[("long", step) for step in range(1, 2 * EVERY)]), "long repeated"),
        (FakeTrial(("long", LONG + 2)), "long took"),
        (FakeTrial(("short", SHORT + 1)), "short ended at step"),
        (FakeTrial(status="failed"), "failed"),
    ],
)
def test_what_is_not_as_expected_is_reported(trial: FakeTrial, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        each_run_once(trial)


def test_a_fault_after_the_end_proves_nothing() -> None:
    trial = FakeTrial()
    trial.finished = {"short", "long"}
    trial.taken = sorted(set(trial.taken))
    with pytest.raises(AssertionError, match="too late"):
        each_run_once(trial)
