"""Tests of runs whose bucket stops in a save and between saves."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import S3Server, start_s3
from small_runs import assert_same, final_state, recipe_tree

from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.report.events import read_events
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run import spool
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.run import run_worker

pytestmark = pytest.mark.s3
STEPS, AWAY_SECONDS = 6, 8.0


@pytest.fixture(scope="module")
def own_server() -> Iterator[S3Server]:
    """An S3 server of these tests, which they stop."""
    server = start_s3()
    yield server
    server.stop()


class Outage:
    """Stops the server when a run polls for the ``at``-th time, and starts it again after ``seconds``."""

    def __init__(self, server: S3Server, *, at: int, seconds: float):
        self.server, self.at, self.seconds = server, at, seconds
        self.polls, self.timer = list[float](), threading.Timer(seconds, self._start)
        self.began = self.ended = 0.0

    def __call__(self) -> bool:
        self.polls.append(time.monotonic())
        if len(self.polls) == self.at:
            self.began = time.monotonic()
            self.server.stop()
            self.timer.start()
        return False

    def _start(self) -> None:
        self.ended = time.monotonic()
        self.server.start()


def bucket_tree(
    tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> dict[str, Any]:
    server.set_environment(monkeypatch)
    monkeypatch.setattr(spool, "spool_root", lambda: tmp_path / "spool")
    tree = recipe_tree(tmp_path, "away", train__max_train_steps=STEPS, **changes)
    return {**tree, "output_dir": f"{server.new_folder()}/away"}


@pytest.mark.parametrize("at", [3, 4], ids=["in a save", "between saves"])
def test_a_run_outlasts_a_bucket_that_is_away(
    tmp_path: Path, own_server: S3Server, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    tree = bucket_tree(tmp_path, own_server, monkeypatch)
    outage = Outage(own_server, at=at, seconds=AWAY_SECONDS)
    summary = run_worker(build_recipe(tree), should_stop=outage)
    outage.timer.join()
    assert summary.exit_reason == "completed"
    assert len(outage.polls) == STEPS and outage.polls[-1] < outage.ended, "training did not wait"
    run = Storage(tree["output_dir"])
    kept = Checkpoints(run).steps()
    assert kept[-1] == STEPS and 2 <= len(kept) <= 3
    straight = recipe_tree(tmp_path, "straight", train__max_train_steps=STEPS)
    run_worker(build_recipe(straight))
    assert_same(final_state(straight), final_state(tree))
    assert [line["step"] for line in read_metrics(run)] == list(range(1, STEPS + 1))
    saved = [event for event in read_events(run) if event["kind"] == "save"]
    assert max(event["background_seconds"] for event in saved) > AWAY_SECONDS / 2
    assert max(event["seconds"] for event in saved) < AWAY_SECONDS / 2
    assert run.exists("summary.json") and run.exists("report.html")


def test_a_run_ends_after_its_patience_and_continues_when_the_bucket_is_back(
    tmp_path: Path, own_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = bucket_tree(tmp_path, own_server, monkeypatch, storage={"patience": 0.05})
    outage = Outage(own_server, at=3, seconds=60)
    try:
        with pytest.raises(
            StorageError, match=r"could not be saved: .*no answer.*Complete on the disk of .*step-0000"
        ):
            run_worker(build_recipe(tree), should_stop=lambda: outage() or time.sleep(1) or False)
        assert time.monotonic() - outage.began < 45
        assert len(outage.polls) < STEPS, "the run ended at the step after the failure"
    finally:
        outage.timer.cancel()
        own_server.start()
    summary = run_worker(build_recipe({**tree, "storage": {"patience": 1}}), resume=True)
    assert summary.exit_reason == "completed"
    straight = recipe_tree(tmp_path, "straight", train__max_train_steps=STEPS)
    run_worker(build_recipe(straight))
    assert_same(final_state(straight), final_state(tree))
