"""The table of faults: what strikes which run, and what must come of it; one function tries any row."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lab import faults
from lab.faults import Fault
from lab.laboratory import Laboratory
from lab.many import FLEET, PACKED, each_run_once, once_some_finished, write_subjects
from lab.trial import EVERY, STEPS, TRAIN, Trial

ONE_SAVE = {"train__checkpointing_steps": STEPS}


@dataclass(frozen=True)
class Row:
    """One fault in one run, and the expected outcome.

    ``code``: the driver's exit code; 0 means that the run goes on by itself. After another code the run must complete
    with ``--resume``. ``repeated``: most steps computed twice. ``tolerance``: largest difference between a weight and
    that of the undisturbed run; 0 requires equal bits, optimizer state included. ``in_ci``: part of the selection for
    every change. ``recipe``: further keys of the recipe, dotted with ``__``. ``slower``: seconds by
    which each step is longer. ``prepare`` is called before the run starts; ``expect`` checks what else holds.
    ``command``: of dreamfleet. ``compare`` returns the difference from the undisturbed run; None where there is none.
    """

    name: str
    fault: Fault
    code: int = 0
    repeated: int = 2 * EVERY  # the newest save may not be complete yet
    tolerance: float = 0.0
    workers: int | tuple[int, int] = 2
    storage: str = "s3"
    in_ci: bool = False
    recipe: dict[str, Any] = field(default_factory=dict)
    strikes_at: int = 25
    slower: float = 0.0
    prepare: Callable[[Laboratory], None] = lambda lab: None
    expect: Callable[[Trial], None] = lambda trial: None
    command: Sequence[str] = TRAIN
    compare: Callable[[Trial, Row, References], float] | None = lambda *of: like_undisturbed(*of)


def like_undisturbed(trial: Trial, row: Row, references: References) -> float:
    """Return the largest difference between a weight and that of the undisturbed run, which the row allows."""
    difference = float(trial.lab.ask("difference", references.find(row), trial.url))
    assert difference <= row.tolerance, f"a weight differs by {difference:.2e} from the undisturbed run"
    return difference


def of_fleet(name: str, fault: Fault, **options: Any) -> Row:
    """Return the row of a fleet: a fault when some of its subjects are finished."""
    return Row(
        f"fleet: {name}",
        once_some_finished(fault),
        command=FLEET,
        workers=1,
        recipe=PACKED,
        strikes_at=0,
        repeated=9 * 2 * EVERY,
        prepare=write_subjects,
        expect=each_run_once,
        compare=None,
        **options,
    )


def is_refused(trial: Trial) -> None:
    """Check that the second driver ended with exit code 2, and named who trains in the folder."""
    assert trial.rival is not None
    assert trial.rival.wait() == 2, (
        f"the second driver ended with {trial.rival.code}: {trial.rival.lines[-5:]}"
    )
    assert "head" in trial.rival.lines[-1], trial.rival.lines[-5:]


def has_one_writer(trial: Trial) -> None:
    """Check that a process which lost rank 0 completed no checkpoint after its successor's first step."""
    steps = [event for event in trial.trace.steps() if event["t"] > trial.struck]
    owner = (steps[-1]["on"], steps[-1]["pid"])
    began = next(event["t"] for event in steps if (event["on"], event["pid"]) == owner)
    saved = [event for event in trial.trace.events() if event["event"] == "saved" and event["t"] > began]
    assert all((event["on"], event["pid"]) == owner for event in saved), saved


def is_told_by_the_kernel(trial: Trial) -> None:
    """Check that the lost machine was known by its kernel's silence, before that of its process."""
    causes = [event["cause"] for event in trial.lab.ask("events", trial.url) if event["kind"] == "regroup"]
    assert any("has not answered" in cause for cause in causes), causes


def ends_with(workers: int) -> Callable[[Trial], None]:
    """Check that the last step was taken by this number of workers."""

    def check(trial: Trial) -> None:
        last = [e for e in trial.trace.events() if e["event"] == "step" and e["step"] == trial.steps]
        assert len({event["rank"] for event in last}) == workers, last

    return check


def without_last_node(lab: Laboratory) -> None:
    """Switch the last node off, and wait until the head has noticed."""
    lab.nodes[-1].power_off(farewell=True)
    deadline = time.monotonic() + 60
    while lab.nodes[-1].ip in lab.living_nodes() and time.monotonic() < deadline:
        time.sleep(0.5)


ROWS = (
    Row("SIGKILL of a worker", faults.kill_worker(1), in_ci=True),
    Row("SIGKILL of rank 0", faults.kill_worker(0)),
    Row("SIGKILL of all workers", faults.kill_all_workers),
    Row("SIGKILL of a worker, shared folder", faults.kill_worker(1), storage="shared"),
    Row("SIGKILL in a save", faults.kill_in_save),
    Row("SIGKILL while starting, at once", faults.kill_starting(0.0), strikes_at=0, repeated=0),
    Row("SIGKILL while starting, after 1.5 s", faults.kill_starting(1.5), strikes_at=0, repeated=0),
    Row("SIGKILL while starting, after 4 s", faults.kill_starting(4.0), strikes_at=0, repeated=0),
    Row("SIGKILL of workers, four times", faults.four_kills, strikes_at=12, repeated=8 * EVERY),
    Row("SIGTERM of a worker", faults.terminate_worker, repeated=1),
    Row("SIGTERM of a node", faults.terminate_node),
    Row("SIGKILL of a raylet", faults.kill_raylet),
    Row("node without power", faults.power_off, expect=is_told_by_the_kernel),
    Row("node of rank 0 without power", faults.power_off_rank_0, in_ci=True, expect=is_told_by_the_kernel),
    Row("node drained, 30 s ahead", faults.drain_node, repeated=1),
    Row("SIGKILL of the driver", faults.kill_driver, code=-9, in_ci=True),
    Row("SIGKILL of the controller", faults.kill_controller, code=1),
    Row("SIGSTOP of a worker for 30 s", faults.pause_worker(30), repeated=0),
    Row("SIGSTOP of a worker for ever", faults.hang_worker, recipe={"scaling__hang_timeout": 60}),
    Row("two nodes lose each other for 20 s", faults.partition(20)),
    Row("two nodes lose each other for 60 s", faults.partition(60)),
    Row("node cut off for 20 s", faults.isolate(20)),
    Row("node cut off for 60 s", faults.isolate(60)),
    Row("S3 away for 8 s, between saves", faults.s3_away(8), repeated=0, in_ci=True, recipe=ONE_SAVE),
    Row("S3 away for 8 s, in a save", faults.s3_away_in_save(8), repeated=0),
    Row("S3 away for 30 s, in a save", faults.s3_away_in_save(30), repeated=0),
    Row("S3 away for 90 s, in a save", faults.s3_away_in_save(90), repeated=0),
    Row("S3 silent for 60 s, in a save", faults.s3_silent(60), repeated=0),
    Row(
        "a second driver with other settings",
        faults.start_second("train.seed=9"),
        repeated=0,
        expect=is_refused,
    ),
    Row(
        "a second driver with --resume, on another machine",
        faults.start_second("--resume", elsewhere=True),
        repeated=0,
        in_ci=True,
        expect=is_refused,
    ),
    Row("rank 0 without the cluster for 90 s", faults.isolate_from_cluster(90), expect=has_one_writer),
    Row("a node lost for good", faults.power_off, workers=(1, 2), expect=ends_with(1)),
    Row(
        "a node joins",
        faults.join,
        workers=(1, 3),
        prepare=without_last_node,
        expect=ends_with(3),
    ),
    of_fleet("SIGKILL of a packed worker", faults.kill_worker(0)),
    of_fleet("node without power", faults.power_off_rank_0),
    of_fleet("SIGKILL of the driver", faults.kill_driver, code=-9),
)


def try_row(lab: Laboratory, row: Row, references: References) -> dict[str, Any]:
    """Try a row on a repaired laboratory; return what was measured. Raises AssertionError if the outcome is another."""
    lab.repair()
    trial = Trial(lab, "trial", row.storage, row.workers, recipe=row.recipe, command=row.command)
    began = time.monotonic()
    try:
        row.prepare(lab)
        trial.lengthen_steps(row.slower)
        driver = trial.start()
        trial.wait_for_step(row.strikes_at)
        row.fault(trial)
        code = driver.wait()
        said = f"\n{chr(10).join(driver.lines[-15:])}"
        assert code == row.code, f"the driver's exit code is {code}{said}"
        if row.code != 0:
            lab.repair()
            again = trial.start("--resume")
            assert again.wait() == 0, f"--resume ended with {again.code}: {again.lines[-15:]}"
        row.expect(trial)
        measured = trial.measure()
        assert measured["repeated"] <= row.repeated, f"{measured}{said}"
        difference = row.compare(trial, row, references) if row.compare else None
        return {
            "fault": row.name,
            "storage": row.storage,
            "workers": row.workers,
            "goes_on": row.code == 0,
            "code": code,
            **measured,
            **({"second_driver": trial.rival.lines} if trial.rival else {}),
            "difference": difference,
            "run_s": round(time.monotonic() - began, 1),
            "load_1min": round(os.getloadavg()[0], 1),
        }
    finally:
        trial.close()


class References:
    """The undisturbed runs that others are compared with, one for each number of workers, trained when first needed."""

    def __init__(self, lab: Laboratory):
        self.lab = lab
        self.addresses: dict[int, str] = {}

    def find(self, row: Row) -> str:
        """Return the address of the undisturbed run of a row's recipe; of its largest number of workers."""
        workers = max(row.workers) if isinstance(row.workers, tuple) else row.workers
        if workers not in self.addresses:
            self.lab.repair()
            trial = Trial(self.lab, "undisturbed", "s3", workers)
            try:
                assert trial.start().wait() == 0, trial.driver.lines[-15:]
            finally:
                trial.close()
            assert trial.repeated() == 0 and trial.trace.last_step() == trial.steps
            self.addresses[workers] = trial.url
        return self.addresses[workers]
