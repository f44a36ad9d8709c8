"""Writes and reads the events of a run: starts, saves, failures and their like, as one JSON object per line.

Each process that reports has its own file in ``events/`` of the run folder, so that no two of them write one file.
"""

from __future__ import annotations

import heapq
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from dreamfleet.datasets.errors import RunFailed, UserError
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.report.observers import tell_observers

FOLDER = "events"
DRIVER, CONTROLLER = "driver", "controller"  # names of the files of the driver and of Ray Train's controller
BUCKET_SECONDS = 10.0  # interval between writes to a bucket, which write the whole file
#: kinds that are frequent, and wait for the next write to a bucket; all others are written at once
FREQUENT = frozenset({"save", "save_retry", "steps", "evaluation"})

log = logging.getLogger(__name__)
_node: list[str] = []


def set_node(name: str) -> None:
    """Set the name of this process's node, such as its address in a cluster, that its events state as ``node``."""
    _node[:] = [name]


class EventLog:
    """Appends the events of one process to ``events/NAME.jsonl``; one writer per file.

    A line has ``kind``, ``at`` (UTC, ISO 8601 with microseconds), ``clock`` (seconds of the machine's monotonic clock,
    for differences within one file), ``host``, ``node`` if :func:`set_node` was called, ``step`` and ``seconds`` where
    they apply, and the event's own details. Writes to a bucket are done by a thread. Methods may be called by any
    thread; an event that cannot be written never ends a run.
    """

    def __init__(self, run: Storage, name: str):
        self.file, self._run = f"{name}.jsonl", run
        self._folder = run.child(FOLDER)
        self._pending = ""
        self._changed = threading.Condition()  # guards what follows
        self._is_urgent = self._is_closed = False
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(
        self, kind: str, *, step: int | None = None, seconds: float | None = None, **details: Any
    ) -> dict[str, Any]:
        """Append an event and return its line.

        ``step``: finished optimizer steps; ``seconds``: the duration; ``details``: values that JSON has.
        """
        line: dict[str, Any] = {"kind": kind, "at": _now(), "clock": round(time.monotonic(), 6)}
        line |= {"host": socket.gethostname()} | ({"node": _node[0]} if _node else {})
        line |= {key: value for key, value in (("step", step), ("seconds", seconds)) if value is not None}
        line |= details
        with self._changed:
            self._pending += json_text(line) + "\n"
            self._is_urgent |= kind not in FREQUENT
            if not self._folder.is_local:
                self._start_thread()
                self._changed.notify_all()
        if self._folder.is_local:
            self.flush()
        tell_observers(self._run, 0 if self.file.startswith("rank-0-") else None, line)
        return line

    def tell(self, kind: str, **details: Any) -> None:
        """Pass an event to the observers of this process, without writing it."""
        rank = 0 if self.file.startswith("rank-0-") else None
        tell_observers(self._run, rank, {"kind": kind, **details})

    def flush(self) -> None:
        """Write all events to the run folder; log a warning if that fails, and keep them for the next time."""
        with self._writing:
            with self._changed:
                text, self._pending, self._is_urgent = self._pending, "", False
            if not text:
                return
            try:
                self._folder.append_text(self.file, text)
            except (UserError, RunFailed) as error:
                log.warning("events are not written yet: %s", error)
                with self._changed:
                    self._pending = text + self._pending

    def close(self) -> None:
        """Write all events; end the thread that writes to a bucket."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self.flush()

    def _start_thread(self) -> None:
        if self._thread is None and not self._is_closed:
            self._thread = threading.Thread(target=self._write_on_time, daemon=True, name="events")
            self._thread.start()

    def _write_on_time(self) -> None:
        while not self._is_closed:
            with self._changed:
                self._changed.wait_for(lambda: self._is_urgent or self._is_closed, timeout=BUCKET_SECONDS)
            self.flush()
            if self._pending:  # the write failed
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closed, timeout=BUCKET_SECONDS)


def open_rank_events(run: Storage, rank: int = 0, *, attempt: int) -> EventLog:
    """Return the events of a rank for an attempt of a run, by its number; only rank 0 writes any."""
    return NoEvents() if rank else EventLog(run, f"rank-0-attempt-{attempt:04d}")


class NoEvents(EventLog):
    """Discards events: of ranks that do not report, and of code that runs without a run folder."""

    def __init__(self) -> None:
        """Open no file."""

    def add(
        self, kind: str, *, step: int | None = None, seconds: float | None = None, **details: Any
    ) -> dict[str, Any]:
        """Discard an event."""
        return {}

    def tell(self, kind: str, **details: Any) -> None:
        """Discard an event."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def read_events(run: Storage) -> list[dict[str, Any]]:
    """Return the events of all processes of a run in order of time; [] for a run without events.

    Events of one file keep their order also if the machine's clock was set back. Each gets ``log``, the name of its
    file without the ending. Lines that are not events, such as an incomplete last one after a crash, are skipped.
    """
    folder = run.child(FOLDER)
    names = [name for name in folder.list() if name.endswith(".jsonl")]
    return [event for _, _, event in heapq.merge(*(_ordered(folder, name) for name in names))]


def _ordered(folder: Storage, name: str) -> Iterator[tuple[str, tuple[str, int], dict[str, Any]]]:
    latest = ""
    for number, text in enumerate(folder.read_text(name).splitlines()):
        try:
            line = json.loads(text)
            at = datetime.fromisoformat(line["at"]).astimezone(UTC).isoformat(timespec="microseconds")
            event = {**line, "kind": str(line["kind"]), "log": name.removesuffix(".jsonl")}
        except (ValueError, KeyError, TypeError):
            continue
        latest = max(latest, at)
        yield latest, (name, number), event


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
