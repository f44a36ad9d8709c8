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
LONGEST_SECONDS = 180.0  # of an outage, if a run waits for its end


@pytest.fixture(scope="module")
def own_server() -> Iterator[S3Server]:
    """An S3 server of these tests, which they stop."""
    server = start_s3()
    yield server
    server.stop()


class Outage:
    """Stops the server when a run polls for the ``at``-th time, and starts it again ``seconds`` after ``last``'s poll.

    ``last``: by default ``at``. If the run does not poll that often, the server is started again after LONGEST_SECONDS.
    """

    def __init__(self, server: S3Server, *, at: int, seconds: float, last: int | None = None):
        self.server, self.at, self.last = server, at, last or at
        self.polls, self.timer = list[float](), threading.Timer(seconds, self._start)
        self.longest = threading.Timer(LONGEST_SECONDS, self._start)
        self.began = self.ended = 0.0

    def __call__(self) -> bool:
        self.polls.append(time.monotonic())
        if len(self.polls) == self.at:
            self.began = time.monotonic()
            self.server.stop()
            self.longest.start()
        if len(self.polls) == self.last:
            self.timer.start()
        return False

    def close(self) -> None:
        """End the timers."""
        for timer in (self.timer, self.longest):
            timer.cancel()

    def _start(self) -> None:
        self.longest.cancel()
        if not self.ended:
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
    outage = Outage(own_server, at=at, seconds=AWAY_SECONDS, last=STEPS)
    summary = run_worker(build_recipe(tree), should_stop=outage)
    outage.close()
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
        outage.close()
        own_server.start()
    left = sorted(int(path.parent.name[-6:]) for path in (tmp_path / "spool").rglob("manifest.json"))
    summary = run_worker(build_recipe({**tree, "storage": {"patience": 1}}), resume=True)
    assert summary.exit_reason == "completed"
    starts = [event["step"] for event in read_events(Storage(tree["output_dir"])) if event["kind"] == "start"]
    assert starts[-1] == left[-1] > 0, "the resumed run continued from the checkpoint on the disk"
    assert not list((tmp_path / "spool").rglob("manifest.json"))
    straight = recipe_tree(tmp_path, "straight", train__max_train_steps=STEPS)
    run_worker(build_recipe(straight))
    assert_same(final_state(straight), final_state(tree))
