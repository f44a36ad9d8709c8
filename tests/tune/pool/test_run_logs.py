"""Test that log messages of runs stay in their run.log, and others are shown."""

from __future__ import annotations

import logging

import pytest

from dreamfleet.tune.pool import run_logs


def test_messages_of_runs_are_not_shown_while_a_pool_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    handler = logging.StreamHandler()
    monkeypatch.setattr(handler, "emit", lambda record: shown.append(record.getMessage()))
    log = logging.getLogger("dreamfleet")
    log.addHandler(handler)
    try:
        with run_logs.without_run_logs():
            log.warning("of the pool")
            monkeypatch.setattr(run_logs, "in_slot", lambda: True)
            log.warning("of a run")
        log.warning("after it")
    finally:
        log.removeHandler(handler)
    assert shown == ["of the pool", "after it"]
