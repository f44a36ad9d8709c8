"""Writes and reads ``metrics.jsonl``: the metrics of a run, one JSON object per logged step."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from dreamfleet.datasets.errors import RunFailed, UserError
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.background import LINES
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.metrics import metrics_by_figure

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"
BUCKET_SECONDS = (
    10.0  # minimum interval between writes of training metrics to a bucket, which write the whole file
)


class MetricsLog:
    """Writes ``metrics.jsonl`` of one run (rank 0 only); its methods may be called by any thread.

    Lines of training are written to a bucket by a thread, so that a bucket that is away does not delay the steps. A
    resumed run first removes the lines after ``start_step``, so that the file is that of an uninterrupted run.
    """

    def __init__(self, run: Storage, *, start_step: int = 0, keeps_all: bool = False):
        self.run = run
        kept = [line for line in read_metrics(run) if line["step"] <= start_step] if start_step else []
        if not keeps_all:
            self.run.write_text(FILE, "".join(json_text(line) + "\n" for line in kept))
        self._pending, self._written = "", time.monotonic()
        self._guard, self._writing = threading.Lock(), threading.Lock()

    @classmethod
    def continued(cls, run: Storage, lines: Sequence[dict[str, Any]]) -> MetricsLog:
        """Return the log of a run whose writer was lost, after adding those of ``lines`` that it did not write."""
        log = cls(run, keeps_all=True)
        written = {_identity(line) for line in read_metrics(run)}
        for line in lines:
            if _identity(line) not in written:
                log._pending += json_text(line) + "\n"
        log.flush()
        return log

    def log(self, line: dict[str, Any]) -> None:
        """Append one line; ``line["step"]`` is the number of finished optimizer steps."""
        with self._guard:
            self._pending += json_text(line) + "\n"
            is_due = time.monotonic() - self._written >= BUCKET_SECONDS
            if is_due:
                self._written = time.monotonic()
        # Write validation rounds immediately, since a search waits for them and reads them from the file.
        if self.run.is_local or "loss" not in line:
            self.flush()
        elif is_due:
            LINES.submit(self._try_flush)

    def flush(self) -> None:
        """Write all lines to the run folder. Raises StorageError if that fails; the lines are kept."""
        with self._writing:
            with self._guard:
                text, self._pending = self._pending, ""
            try:
                if text:
                    self.run.append_text(FILE, text)
            except BaseException:
                with self._guard:
                    self._pending = text + self._pending
                raise

    def _try_flush(self) -> None:
        try:
            self.flush()
        except (UserError, RunFailed) as error:  # the last flush of the run raises it, if it lasts
            log.warning("metrics are not written yet: %s", error)


def read_metrics(run: Storage) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics; an incomplete last line (after a crash) is skipped."""
    if not run.exists(FILE):
        return []
    lines = []
    for text in run.read_text(FILE).splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def _identity(line: dict[str, Any]) -> tuple[int, frozenset[str]]:
    return line["step"], frozenset(line)


def logged_figures(run: Storage) -> dict[str, float]:
    """Return the last logged value of each metric that a run's summary reports."""
    summarised = {"loss", "accuracy", *metrics_by_figure()}
    found: dict[str, float] = {}
    for line in read_metrics(run):
        found |= {name: value for name, value in line.items() if name in summarised}
    return found
