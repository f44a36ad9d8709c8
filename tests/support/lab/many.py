"""A fleet on the laboratory: runs that are packed on the workers of its nodes, and what must come of them."""

from __future__ import annotations

import json
from typing import Any

from lab.faults import Fault
from lab.laboratory import IMAGES, Laboratory
from lab.trial import EVERY, Trial

SHORT, LONG = 10, 40  # steps of the runs that are finished before a fault strikes, and of the others
SUBJECTS = "/tmp/subjects.jsonl"
FLEET = ("fleet", SUBJECTS)
PACKED: dict[str, Any] = {  # nine runs on three nodes: three in each process
    "method": {"name": "textual_inversion", "placeholder_token": "<my-cat>", "initializer_token": "cat face"},
    "data__instance_prompt": "a <my-cat>",
    "scaling": {"num_workers": 1, "cpus_per_worker": 1, "slots_per_worker": 3},
    "report_to": [],
}


def write_subjects(lab: Laboratory) -> None:
    """Write the table of nine subjects onto the head's disk; every third of them is short."""
    rows = [
        {
            "name": f"cat {number}",
            "images": f"{IMAGES}/train",
            "train": {"max_train_steps": LONG if number % 3 else SHORT, "seed": number},
        }
        for number in range(9)
    ]
    path = lab.head.disk / SUBJECTS.lstrip("/")
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def once_some_finished(fault: Fault, *, count: int = 2) -> Fault:
    """Strike when ``count`` runs are finished, and others are not."""

    def strike(trial: Trial) -> None:
        trial.wait_for(lambda: len(finished(trial)) >= count, what=f"{count} finished runs")
        fault(trial)
        trial.finished = finished(trial)

    strike.__doc__ = fault.__doc__
    return strike


def finished(trial: Trial) -> set[str]:
    """Return the names of the runs whose summary says that they are completed."""
    names = {event["run"] for event in trial.trace.steps() if event["step"] >= SHORT}
    summaries = {name: trial.lab.ask("summary", f"{trial.url}/subjects/{name}") for name in sorted(names)}
    return {name for name, summary in summaries.items() if summary.get("exit_reason") == "completed"}


def each_run_once(trial: Trial) -> None:
    """Check that every run is completed, that no finished run took a step again, and what the others repeated."""
    taken = trial.executions()
    statuses = trial.lab.ask("statuses", f"{trial.url}/fleet.parquet")
    assert statuses and set(statuses.values()) == {"completed"}, statuses
    for run in statuses:
        steps = {step: times for (name, step), times in taken.items() if name == run}
        assert sorted(steps) == list(range(1, max(steps, default=0) + 1)), f"{run} took {sorted(steps)}"
        assert max(steps) in (SHORT, LONG), f"{run} ended at step {max(steps)}"
        most = 0 if run in trial.finished else 2 * EVERY
        repeated = sum(steps.values()) - len(steps)
        assert repeated <= most, f"{run} repeated {repeated} steps; finished before: {sorted(trial.finished)}"
    assert 0 < len(trial.finished) < len(statuses), f"the fault struck too late: {sorted(trial.finished)}"
