"""Figures of a run: one JSON line a logged step, the same to TensorBoard."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.metrics import metrics_by_figure

FILE = "metrics.jsonl"
# Between two writings of training figures to a bucket, where each writes the whole file.
BUCKET_SECONDS = 10.0


class Metrics:
    """Writes ``metrics.jsonl`` and, when asked for, TensorBoard event files of one run (rank 0 only).

    A resumed run first drops the lines after the step it continues from, so that the file reads as if the run had never
    stopped.
    """

    def __init__(self, run: Storage, *, start_step: int = 0, report_to: Sequence[str] = ()):
        self.run = run
        if start_step == 0:
            self.run.write_text(FILE, "")
        else:
            kept = [line for line in read_metrics(run) if line["step"] <= start_step]
            self.run.write_text(FILE, "".join(json_text(line) + "\n" for line in kept))
        self._pending, self._written = "", time.monotonic()
        self._board, self._local = None, None
        if "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter

            if run.is_local:
                folder = run.path("tensorboard")
            else:  # event files need a real file to append to; they are uploaded with every flush
                self._local = tempfile.TemporaryDirectory(prefix="dreamfleet-tensorboard-")
                folder = self._local.name
            self._board = SummaryWriter(
                folder, purge_step=start_step + 1 if start_step else None, flush_secs=10
            )

    def log(self, line: dict[str, Any]) -> None:
        """Append one line; ``line["step"]`` counts finished optimizer steps. Nested dicts become ``key/inner`` tags."""
        self._pending += json_text(line) + "\n"
        # A search waits for validation rounds, and reads them from the file.
        is_round = "loss" not in line
        if self.run.is_local or is_round or time.monotonic() - self._written >= BUCKET_SECONDS:
            self._write_pending()
        if self._board is not None:
            for tag, value in _flatten(line).items():
                if tag != "step" and isinstance(value, int | float) and math.isfinite(value):
                    self._board.add_scalar(tag, value, line["step"])

    def log_image(self, tag: str, image: Any, step: int) -> None:
        """Add a picture (PIL, RGB) to TensorBoard."""
        if self._board is not None:
            import numpy as np

            self._board.add_image(tag, np.asarray(image), step, dataformats="HWC")

    def flush(self) -> None:
        """Bring everything written so far to the run folder."""
        self._write_pending()
        if self._board is not None:
            self._board.flush()
            if self._local is not None:
                self.run.upload(Path(self._local.name), "tensorboard")

    def close(self) -> None:
        """Flush and stop."""
        self.flush()
        if self._board is not None:
            self._board.close()
        if self._local is not None:
            self._local.cleanup()

    def _write_pending(self) -> None:
        if self._pending:
            self.run.append_text(FILE, self._pending)
        self._pending, self._written = "", time.monotonic()


def read_metrics(run: Storage) -> list[dict[str, Any]]:
    """Read the metric lines of a run folder; a torn last line (from a crash) is left out."""
    if not run.exists(FILE):
        return []
    lines = []
    for text in run.read_text(FILE).splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def logged_figures(run: Storage) -> dict[str, float]:
    """Return the last logged value of each figure that a run's summary reports."""
    summarised = {"loss", "accuracy", *metrics_by_figure()}
    found: dict[str, float] = {}
    for line in read_metrics(run):
        found |= {name: value for name, value in line.items() if name in summarised}
    return found


def _flatten(line: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in line.items():
        flat.update(
            _flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat
