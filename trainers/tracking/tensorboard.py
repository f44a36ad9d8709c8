"""Writes the TensorBoard event files of a run, on disk or by upload to a bucket."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamfleet.trainers.tracking.tracker import TrackedRun, Tracker, flatten

if TYPE_CHECKING:  # recipes load without PIL
    from PIL import Image


class TensorBoard(Tracker):
    """Writes ``tensorboard/`` in the run folder. A resumed run hides the events after its first step."""

    def __init__(self, run: TrackedRun):
        super().__init__(run)
        from torch.utils.tensorboard import SummaryWriter

        self._local = None
        if run.folder.is_local:
            folder = run.folder.path("tensorboard")
        else:  # a bucket has no append: event files are written locally and uploaded with every flush
            self._local = tempfile.TemporaryDirectory(prefix="dreamfleet-tensorboard-")
            folder = self._local.name
        start = run.start_step
        self._writer = SummaryWriter(folder, purge_step=start + 1 if start else None, flush_secs=10)

    def log(self, line: Mapping[str, Any]) -> None:
        """Write the finite numbers of a line of metrics; nested dicts become ``key/inner`` tags."""
        for tag, value in flatten(line).items():
            if tag != "step" and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(tag, value, line["step"])

    def log_image(self, tag: str, image: Image.Image, step: int) -> None:
        """Write an RGB image ``[H, W, 3]`` under ``tag``."""
        import numpy as np

        self._writer.add_image(tag, np.asarray(image), step, dataformats="HWC")

    def flush(self) -> None:
        """Write all events so far to the run folder."""
        self._writer.flush()
        if self._local is not None:
            self.run.folder.upload(Path(self._local.name), "tensorboard")

    def close(self, results: Mapping[str, Any] | None) -> None:
        """Flush and close the event files."""
        self.flush()
        self._writer.close()
        if self._local is not None:
            self._local.cleanup()
