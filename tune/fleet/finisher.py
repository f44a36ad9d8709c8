"""Finishes the subjects that ended, in a thread: removes checkpoints, records results, and writes the page."""

from __future__ import annotations

import dataclasses
import json
import logging
import queue
import threading
import time
from collections.abc import Mapping
from typing import Any

from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.packing.task import End
from dreamfleet.tune.fleet.fleet_rows import FleetRows
from dreamfleet.tune.fleet.page import FleetPage
from dreamfleet.tune.fleet.progress import COMPLETED, FAILED, INTERRUPTED
from dreamfleet.tune.fleet.records import Records
from dreamfleet.tune.fleet.rows import scores_of
from dreamfleet.tune.fleet.thumbnails import write_thumbnail

LOCAL_SECONDS, BUCKET_SECONDS = 1.0, 5.0  # between two writes of the record
PAGE_SECONDS = 30.0  # between two writes of the page; longer if writing it takes longer than a tenth of that
MAX_WAITING = 256  # ended subjects that wait for this thread; more make the driver wait

log = logging.getLogger(__name__)


class Finisher:
    """Takes the subjects that ended from the driver's thread, whose next subjects need not wait for files.

    A subject is recorded after its checkpoints were removed: if the process is killed in between, the summary in its
    run folder tells a resumed fleet that it is completed. ``keep_checkpoints``: do not remove them.
    """

    def __init__(
        self, fleet: Storage, records: Records, rows: FleetRows, page: FleetPage, *, keep_checkpoints: bool
    ):
        self.fleet, self.records, self.rows, self.page = fleet, records, rows, page
        self.keep_checkpoints = keep_checkpoints
        self.changed: set[int] = set()  # rows that changed since the page was written
        self._lock = threading.Lock()
        self._ended: queue.Queue[tuple[int, End, int] | None] = queue.Queue(MAX_WAITING)
        self._unwritten: list[dict[str, Any]] = []
        self._error: Exception | None = None
        self._page_at = 0.0
        self._thread = threading.Thread(target=self._work, daemon=True, name="fleet-finisher")

    def start(self) -> None:
        """Start the thread, which writes the page first."""
        self._thread.start()

    def touch(self, index: int) -> None:
        """Note that the row of a subject changed."""
        with self._lock:
            self.changed.add(index)

    def end(self, index: int, end: End, *, resolution: int) -> None:
        """Finish a subject; ``resolution``: its ``data.resolution``.

        Raises UserError if the record cannot be written.
        """
        self._ended.put((index, end, resolution))
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Finish all subjects and write the page. Raises UserError if the record cannot be written."""
        self._ended.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        seconds = LOCAL_SECONDS if self.fleet.is_local else BUCKET_SECONDS
        self._write_page()
        written, is_open = time.monotonic(), True
        while is_open:
            try:
                found = self._ended.get(timeout=seconds)
                is_open = found is not None
                if found is not None:
                    self._finish(*found)
            except queue.Empty:
                pass
            if not is_open or time.monotonic() - written >= seconds:
                self._write_records()
                written = time.monotonic()
            if is_open and time.monotonic() >= self._page_at:
                self._write_page()
        self._write_page(final=True)

    def _finish(self, index: int, end: End, resolution: int) -> None:
        subject = self.rows.subjects[index]
        folder = f"subjects/{subject.name}"
        record: dict[str, Any] = {
            "name": subject.name,
            "row": subject.row,
            "status": end.exit_reason,
            "digest": subject.digest,
            "error": end.error,
            "kind": end.kind,
            "seconds": round(end.seconds, 3),
            "ended": time.time(),
            **_results(end.summary or {}),
        }
        try:
            if end.exit_reason == "completed" and not self.keep_checkpoints:
                self.fleet.remove(f"{folder}/checkpoints")
            if end.exit_reason == "failed":
                self._write_failure(folder, subject.name, end)
            images = write_thumbnail(self.fleet, subject.name, folder, resolution=resolution)
            record["images"] = dataclasses.asdict(images) if images else None
        except Exception as error:  # noqa: BLE001 - the subject is trained; its result must be recorded
            log.warning("%s: %s: %s", folder, type(error).__name__, error)
        self.rows.put(index, record)
        if end.exit_reason in ("completed", "failed"):
            self._unwritten.append(record)
        self.touch(index)

    def _write_failure(self, folder: str, name: str, end: End) -> None:
        """Write the reason into the run folder, whose process may have died before it wrote a summary."""
        path = f"{folder}/summary.json"
        try:
            before = json.loads(self.fleet.read_text(path)) if self.fleet.exists(path) else {}
        except ValueError:
            before = {}  # written by a killed process
        failure = {"run": name, "exit_reason": "failed", "error": end.error, "kind": end.kind}
        self.fleet.write_text(path, json_text({**before, **failure}, indent=1))

    def _write_records(self) -> None:
        try:
            self.records.append(self._unwritten)
            self._unwritten.clear()
        except Exception as error:  # noqa: BLE001 - passed to the driver's thread
            self._error = error  # the driver raises it, and the lines are tried again until then

    def _write_page(self, *, final: bool = False) -> None:
        with self._lock:
            changed, self.changed = self.changed, set()
        began = time.monotonic()
        try:
            self.page.update(self.rows, changed, final=final)
        except Exception as error:  # noqa: BLE001 - a page that fails must not end the fleet
            log.warning("the page of the fleet could not be written: %s", error)
            with self._lock:
                self.changed |= changed
        now = time.monotonic()
        self._page_at = now + max(PAGE_SECONDS, 10 * (now - began))


def state_of(end: End) -> int:
    """Return the state of a subject that ended."""
    return {"completed": COMPLETED, "failed": FAILED}.get(end.exit_reason, INTERRUPTED)


def _results(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the record keeps of a run's summary."""
    return {
        "steps": summary.get("steps", 0),
        "scores": scores_of(summary.get("figures", {})),
        "exports": summary.get("exports", []),
    }


def record_of_summary(name: str, row: int, digest: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a completed run whose end was not recorded."""
    return {
        "name": name,
        "row": row,
        "status": "completed",
        "digest": digest,
        "seconds": summary.get("wall_seconds", 0.0),
        "ended": time.time(),
        **_results(summary),
    }
