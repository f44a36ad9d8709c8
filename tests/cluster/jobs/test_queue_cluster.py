"""Test the queue on a head node with two CPUs: three runs of which two fit, and one of higher priority."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from ray_head import Head, dreamfleet

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("client"),
]


def write(folder: Path, name: str, steps: int) -> Path:
    tree = tiny.make_recipe(
        folder,
        output_dir=str(folder / "runs" / name),
        scaling__num_workers=1,
        scaling__resources_per_worker={"CPU": 1},
        train__max_train_steps=steps,
        train__checkpointing_steps=100_000,
    )
    return tiny.write_recipe(folder / f"{name}.yaml", tree)


def many(folder: Path, *words: object) -> list[str]:
    sent = dreamfleet("submit", "--many", f"--shared={folder / 'runs'}", *words)
    assert sent.exit_code == 0, sent.output
    return sent.stdout.split()


def states() -> dict[str, str]:
    """Return the states of the runs, of started ones that of their newest job."""
    return {
        row["id"].rsplit("-", 2)[0].partition("-")[0]: row["state"]
        for row in rows()
        if "queue" not in row["id"]
    }


def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(dreamfleet("jobs", "--json").stdout)
    return found


def wait(what: Callable[[], object], message: str) -> None:
    deadline = time.monotonic() + 300
    while not what():
        if time.monotonic() > deadline:
            raise AssertionError(f"{message}: {json.dumps(rows(), indent=1)}")
        time.sleep(1)


def queue_processes(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "dreamfleet.cluster.jobs.queue_job run" in command and str(folder) in command:
            found.append(int(process.name))
    return found


@pytest.fixture
def _nothing_is_left(client: None) -> Iterator[None]:
    """Stop what a failed test left running on the cluster that others use too."""
    yield
    for row in rows():
        if row["state"] == "RUNNING":
            dreamfleet("stop", row["id"])


@pytest.mark.usefixtures("_nothing_is_left")
def test_runs_wait_start_whole_are_preempted_and_survive_the_queue(tmp_path: Path, head: Head) -> None:
    paths = [write(tmp_path, name, 100_000) for name in ("one", "two", "three")]
    ids = many(tmp_path, *paths)
    assert [found.partition("-")[0] for found in ids] == ["one", "two", "three"]
    wait(
        lambda: list(states().values()).count("RUNNING") == 2 and training(tmp_path, "two"),
        "two of three run",
    )
    assert states()["three"] == "WAITING"

    for process in queue_processes(tmp_path):  # the queue's own process dies; it is started again
        os.kill(process, signal.SIGKILL)
    urgent = write(tmp_path, "urgent", 4)
    many(tmp_path, urgent, "--priority", "5")
    wait(lambda: (tmp_path / "runs" / "urgent" / "summary.json").exists(), "the run of higher priority")
    summary = json.loads((tmp_path / "runs" / "two" / "summary.json").read_text())
    assert summary["exit_reason"] == "interrupted" and summary["steps"] > 0, "the newest run saved"
    assert not (tmp_path / "runs" / "one" / "summary.json").exists(), "one run had to make room, not two"
    assert not (tmp_path / "runs" / "three").exists()

    wait(lambda: states()["two"] == "RUNNING", "the preempted run continues")
    (three,) = [found for found in ids if found.startswith("three")]
    stopped = dreamfleet("stop", three)
    assert stopped.stdout == f"{three} STOPPED\n", stopped.output
    wait(lambda: "continuing from step" in log_of(tmp_path, "two"), "from its checkpoint")
    for name in ids[:2]:
        assert dreamfleet("stop", name).exit_code == 0
    wait(lambda: all(row["state"] != "RUNNING" for row in rows()), "the queue ends when nothing is left")
    assert (
        json.loads((tmp_path / "runs" / "two" / "summary.json").read_text())["exit_reason"] == "interrupted"
    )


def training(folder: Path, name: str) -> bool:
    return (folder / "runs" / name / "metrics.jsonl").exists()


def log_of(folder: Path, name: str) -> str:
    path = folder / "runs" / name / "run.log"
    return path.read_text() if path.exists() else ""
