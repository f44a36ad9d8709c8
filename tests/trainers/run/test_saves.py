"""Tests of checkpoints that threads write while a run continues, on disk and in a bucket that stops."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import S3Server, start_s3

from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.storage.background import WRITER
from dreamfleet.datasets.storage.retry import patience
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.report.events import EventLog, read_events
from dreamfleet.trainers.run import spool
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.saves import Saves

DUE = 2  # the schedule saves every DUE steps


def make_saves(run: Storage, *, limit: int | None = None, **options: Any) -> Saves:
    return Saves(Checkpoints(run, limit=limit), bests=[], is_due=lambda step: step % DUE == 0, **options)


def start(saves: Saves, step: int) -> None:
    """Save a state whose weight is the step."""
    saves.require_room()
    state = {"learned": {"w": torch.full((3,), float(step))}, "engine": {"m": torch.zeros(2)}}
    saves.start(step, lambda: state, {"method": "x"}, seconds=0.5)


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """Keep the writer busy until the event is set."""
    released = threading.Event()
    WRITER.submit(released.wait)
    yield released
    released.set()


def test_a_save_is_written_after_it_returned(tmp_path: Path, held: threading.Event) -> None:
    run, noted = Storage(tmp_path), list[str]()
    log = EventLog(run, "rank-0")
    saves = make_saves(run, events=log, after_save=lambda: noted.append(threading.current_thread().name))
    start(saves, 2)
    assert saves.checkpoints.steps() == [] and not noted
    held.set()
    saves.finish()
    assert saves.checkpoints.steps() == [2] and noted == [WRITER.name]
    (event,) = read_events(run)
    assert (event["kind"], event["step"], event["seconds"]) == ("save", 2, 0.5)
    assert event["background_seconds"] > 0


def test_the_best_checkpoint_is_kept_until_a_better_one_is_complete(
    tmp_path: Path, held: threading.Event
) -> None:
    run = Storage(tmp_path)
    saves = make_saves(run, limit=1)
    held.set()
    saves.bests.append(3)
    start(saves, 3)  # the best so far; not a step of the schedule
    start(saves, 4)
    saves.require_room()
    assert saves.checkpoints.steps() == [3, 4]
    again = threading.Event()
    saves.bests.append(5)  # as of now, 5 is the best, and not yet written
    saves.tidy(4)
    saves.require_room()
    assert saves.checkpoints.steps() == [3, 4], "there is no better one on the disk"
    WRITER.submit(again.wait)
    start(saves, 5)
    again.set()
    start(saves, 6)
    saves.finish()
    assert saves.checkpoints.steps() == [5, 6]


class Full(Checkpoints):
    """Checkpoints on a disk that is full from step 4 on."""

    def write(self, step: int, **options: Any) -> None:
        if step >= 4:
            raise StorageError("the disk is full")
        super().write(step, **options)


@pytest.mark.parametrize("end", [Saves.finish, Saves.require_room])
def test_an_error_in_the_background_is_raised_at_the_next_save_and_at_the_end(
    tmp_path: Path, end: Callable[[Saves], None]
) -> None:
    saves = Saves(Full(Storage(tmp_path)), bests=[], is_due=lambda step: True)
    start(saves, 2)
    start(saves, 4)
    with pytest.raises(
        StorageError, match=r"step 4 could not be saved: the disk is full; the checkpoint of step 2"
    ):
        end(saves)
    assert saves.has_failed and saves.checkpoints.steps() == [2]


def test_an_error_elsewhere_waits_for_the_save_and_logs_its_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saves = Saves(Full(Storage(tmp_path)), bests=[], is_due=lambda step: True)
    start(saves, 4)
    saves.close()
    assert "step 4 could not be saved" in caplog.text


# ---- a bucket that stops -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_server() -> Iterator[S3Server]:
    """An S3 server of these tests, which they stop."""
    server = start_s3()
    yield server
    server.stop()


@pytest.fixture
def bucket(own_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], Storage]:
    """Return a function that opens a new folder in the bucket; spools are in the test's folder."""
    own_server.set_environment(monkeypatch)
    monkeypatch.setattr(spool, "spool_root", lambda: tmp_path / "spool")
    url = own_server.new_folder()
    return lambda: Storage(url)


def waiting(folder: Path) -> list[str]:
    """Return the names of the complete checkpoints that wait on the disk."""
    return sorted(path.parent.name for path in (folder / "spool").rglob("manifest.json"))


@pytest.mark.s3
def test_saves_wait_on_the_disk_while_the_bucket_is_away(
    bucket: Callable[[], Storage], own_server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Test that neither a save nor the next ones wait, and that the best and the newest reach the bucket."""
    run = bucket()
    saves = make_saves(run, events=EventLog(Storage(tmp_path / "log"), "rank-0"))
    with patience(120.0):
        start(saves, 2)
        saves.require_room()
        assert saves.checkpoints.steps() == [2] and waiting(tmp_path) == []
        own_server.stop()
        began = time.monotonic()
        start(saves, 4)
        for step in (6, 8, 10):
            if step == 6:
                saves.bests.append(6)
            start(saves, step)
        saves._write.result()
        assert time.monotonic() - began < 60
        assert waiting(tmp_path) == ["step-000004", "step-000006", "step-000010"]
        assert not saves.has_failed
        own_server.start()
        saves.finish()
    assert saves.checkpoints.steps() == [2, 4, 6, 10] and not list((tmp_path / "spool").iterdir())
    for step in (4, 6, 10):
        assert saves.checkpoints.load(step).learned["w"][0] == step
    assert "trying again, for up to 2 minutes" in caplog.text and "answers again" in caplog.text
    assert "save_retry" in {event["kind"] for event in read_events(Storage(tmp_path / "log"))}


@pytest.mark.s3
def test_after_its_patience_a_save_fails_and_names_the_checkpoint_on_the_disk(
    bucket: Callable[[], Storage], own_server: S3Server, tmp_path: Path
) -> None:
    saves = make_saves(bucket())
    try:
        with patience(2.0):
            start(saves, 2)
            saves.require_room()
            own_server.stop()
            start(saves, 4)
            with pytest.raises(
                StorageError, match=r"step 4 could not be saved: .*no answer.*step-000004"
            ) as caught:
                saves.finish()
            saves.close()
        place = str(caught.value).rpartition(": ")[2]
        assert (
            place.startswith(str(tmp_path)) and Checkpoints(Storage(Path(place).parents[1])).load(4).step == 4
        )
    finally:
        own_server.start()
