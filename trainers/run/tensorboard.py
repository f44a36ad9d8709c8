"""Writes the TensorBoard event files of a run, on disk or by upload to a bucket."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreamfleet.datasets.storage.storage import Storage


class TensorBoard:
    """Writes ``tensorboard/`` in a run folder. A resumed run hides the events after ``start_step``."""

    def __init__(self, run: Storage, *, start_step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self.run, self._local = run, None
        if run.is_local:
            folder = run.path("tensorboard")
        else:  # a bucket has no append: event files are written locally and uploaded with every flush
            self._local = tempfile.TemporaryDirectory(prefix="dreamfleet-tensorboard-")
            folder = self._local.name
        self._writer = SummaryWriter(folder, purge_step=start_step + 1 if start_step else None, flush_secs=10)

    def log(self, line: dict[str, Any]) -> None:
        """Write the finite numbers of a line of metrics; nested dicts become ``key/inner`` tags."""
        for tag, value in _flatten(line).items():
            if tag != "step" and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(tag, value, line["step"])

    def log_image(self, tag: str, image: Image.Image, step: int) -> None:
        """Write an RGB image ``[H, W, 3]`` under ``tag``."""
        self._writer.add_image(tag, np.asarray(image), step, dataformats="HWC")

    def flush(self) -> None:
        """Write all events so far to the run folder."""
        self._writer.flush()
        if self._local is not None:
            self.run.upload(Path(self._local.name), "tensorboard")

    def close(self) -> None:
        """Flush and close the event files."""
        self.flush()
        self._writer.close()
        if self._local is not None:
            self._local.cleanup()


def _flatten(line: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in line.items():
        flat.update(
            _flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat
