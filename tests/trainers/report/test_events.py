"""Tests of the events of a run: order, several files, damaged lines, and writes to a bucket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.report import events
from dreamfleet.trainers.report.events import EventLog, open_rank_events, read_events


def kinds(run: Storage) -> list[str]:
    return [event["kind"] for event in read_events(run)]


def test_an_event_has_time_host_and_details(tmp_path: Path) -> None:
    run = Storage(tmp_path)
    log = EventLog(run, "driver")
    log.add("failure", step=7, rank=1, cause="killed")
    log.add("save", step=10, seconds=0.25)
    failure, save = read_events(run)
    assert failure["step"] == 7 and failure["rank"] == 1 and failure["cause"] == "killed"
    assert failure["at"].endswith("+00:00") and failure["host"] and failure["log"] == "driver"
    assert "seconds" not in failure and save["seconds"] == 0.25
    assert save["clock"] >= failure["clock"]


def test_files_are_merged_by_time_and_each_keeps_its_order(tmp_path: Path) -> None:
    lines = {
        "driver": [("start", "2026-01-01T10:00:00+00:00"), ("failure", "2026-01-01T10:00:05+00:00")],
        # The machine's clock was set back between these two.
        "rank-0-attempt-0001": [
            ("ready", "2026-01-01T10:00:04+00:00"),
            ("save", "2026-01-01T10:00:02+00:00"),
        ],
    }
    (tmp_path / "events").mkdir()
    for name, rows in lines.items():
        text = "".join(json.dumps({"kind": kind, "at": at}) + "\n" for kind, at in rows)
        (tmp_path / "events" / f"{name}.jsonl").write_text(text)
    assert kinds(Storage(tmp_path)) == ["start", "ready", "save", "failure"]


def test_lines_that_are_not_events_are_skipped(tmp_path: Path) -> None:
    run = Storage(tmp_path)
    assert read_events(run) == []
    EventLog(run, "driver").add("start")
    with (tmp_path / "events" / "driver.jsonl").open("a") as file:
        file.write('[]\n{"kind": "end"}\n{"kind": "x", "at": 3}\n{"kind": "end", "at": "2026-01-0')
    assert kinds(run) == ["start"]


def test_each_attempt_of_rank_0_has_its_own_file(tmp_path: Path) -> None:
    run = Storage(tmp_path)
    for rank, attempt in ((0, 1), (1, 1), (0, 2)):
        open_rank_events(run, rank, attempt=attempt).add("start")
    assert run.list("events") == ["rank-0-attempt-0001.jsonl", "rank-0-attempt-0002.jsonl"]


class Bucket(Storage):
    """A folder that behaves as a bucket that can be lost."""

    is_local = False  # type: ignore[assignment]
    lost = False
    writes = 0

    def child(self, *parts: str) -> Storage:
        return self

    def append_text(self, rel: str, text: str) -> None:
        if self.lost:
            raise StorageError("the bucket cannot be reached")
        self.writes += 1
        self.text: str = getattr(self, "text", "") + text


def test_saves_share_a_write_to_a_bucket_and_a_failed_write_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(events, "BUCKET_SECONDS", 0.01)
    run = Bucket(tmp_path)
    run.lost = True
    log = EventLog(run, "driver")
    log.add("failure")
    log.flush()
    assert "cannot be reached" in caplog.text
    run.lost = False
    log.add("save", step=1)
    log.add("save", step=2)
    log.close()
    lines = [json.loads(line)["kind"] for line in run.text.splitlines()]
    assert lines == ["failure", "save", "save"]
    assert run.writes <= 3
