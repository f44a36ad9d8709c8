"""Writes a run's recipe, metrics, images, summary and report into its folder."""

from __future__ import annotations

import dataclasses
import io
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from PIL import Image

from dreamfleet.datasets.errors import RunFailed, UserError
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.distributed.pulse import Pulse
from dreamfleet.trainers.report.events import EventLog, NoEvents, read_events
from dreamfleet.trainers.report.metrics_log import MetricsLog, logged_figures
from dreamfleet.trainers.report.observers import tell_observers
from dreamfleet.trainers.report.timeline import read_timeline
from dreamfleet.trainers.run.build import Parts
from dreamfleet.trainers.run.evaluation import Previews
from dreamfleet.trainers.run.provenance import provenance
from dreamfleet.trainers.run.summary import Summary
from dreamfleet.trainers.run.versions import versions
from dreamfleet.trainers.tracking.tracker import TrackedRun, Trackers, open_trackers

log = logging.getLogger(__name__)

KEPT_LINES = 1000  # of metrics, on ranks that do not write them
UNWRITTEN_SECONDS = 15.0  # TensorBoard's writer flushes every ten seconds


class Recorder:
    """Writes the run folder on rank 0. Other ranks do not call :meth:`open`, and keep the newest lines in memory."""

    def __init__(
        self,
        parts: Parts,
        run: Storage,
        *,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        events: EventLog | None = None,
    ):
        self.parts, self.run, self.on_progress = parts, run, on_progress
        self.events = events or NoEvents()
        self.metrics: MetricsLog | None = None
        self.trackers = Trackers()
        self.scores: dict[str, float] = {}  # of the newest previews
        # What rank 0 may not have written yet, should this rank have to take over: (time, line)
        self._recent: deque[tuple[float, dict[str, Any]]] = deque(maxlen=KEPT_LINES)

    def follow(self, pulse: Pulse) -> None:
        """Write the progress of ``pulse`` as events: ``steps`` with their ``count``, and each ``evaluation``."""

        def on_steps(step: int, count: int, seconds: float) -> None:
            self.events.add("steps", step=step, seconds=seconds, count=count)

        def on_phase(phase: str, step: int, seconds: float) -> None:
            if phase == "evaluation":
                self.events.add("evaluation", step=step, seconds=seconds)

        pulse.on_steps, pulse.on_phase = on_steps, on_phase

    def open(self, start_step: int, *, engine_reason: str) -> None:
        """Write ``recipe.yaml`` and open ``metrics.jsonl`` and the trackers of ``report_to``."""
        recipe = self.parts.recipe
        head = provenance(self.parts, engine_reason)
        self.run.write_text("recipe.yaml", head + recipe.to_yaml())
        self.metrics = MetricsLog(self.run, start_step=start_step)
        self.trackers = open_trackers(TrackedRun(self.run, recipe, start_step, versions()))

    @property
    def is_open(self) -> bool:
        """Whether this rank writes the run folder."""
        return self.metrics is not None

    def take_over(self, step: int) -> None:
        """Continue the files of a rank that was lost after ``step``: add the lines that it logged and did not write."""
        lines = [line for _, line in self._recent]
        self.metrics = MetricsLog.continued(self.run, lines)
        since = time.monotonic() - UNWRITTEN_SECONDS
        shown = [line for at, line in self._recent if at >= since or not self.run.is_local]
        start_step = max(1, shown[0]["step"] - 1 if shown else step)  # 0 would be a new run
        self.trackers = open_trackers(TrackedRun(self.run, self.parts.recipe, start_step, versions()))
        for line in shown:
            self.trackers.log(line)
        self._recent.clear()

    def log(self, line: dict[str, Any]) -> None:
        """Write a line of metrics to the log and the trackers on rank 0; pass it to observers on every rank."""
        shown = {**line, "total_steps": self.parts.schedule.total}
        tell_observers(self.run, self.parts.distributed.rank, shown)
        if self.metrics is None:
            self._recent.append((time.monotonic(), line))
        else:
            self.metrics.log(line)
            self.trackers.log(line)
            if self.on_progress is not None:
                self.on_progress(shown)

    def log_scores(self, step: int, scores: dict[str, float]) -> None:
        """Log the scores of a step's previews; the summary contains the newest scores."""
        self.scores.update(scores)
        self.log({"step": step, **scores})

    def flush(self) -> None:
        """Write every line logged so far to the run folder."""
        self.events.flush()
        if self.metrics is not None:
            self.metrics.flush()
        self.trackers.flush()

    def flush_after_error(self) -> None:
        """Write the lines of a run that failed; log an error of this, which must not replace the run's own."""
        try:
            self.flush()
        except (UserError, RunFailed) as error:
            log.warning("not all metrics could be written: %s", error)

    def write_previews(self, step: int, previews: Previews) -> None:
        """Log the scores of a step's previews, and write their grid to the run folder and the trackers."""
        if previews.scores:
            self.log_scores(step, previews.scores)
        name = f"samples/step-{step:06d}"
        self.run.write_bytes(f"{name}.png", previews.grid)
        self.trackers.log_image("samples", Image.open(io.BytesIO(previews.grid)), step)
        self.run.write_text(f"{name}.jsonl", "\n".join(map(json_text, previews.cells)) + "\n")

    def close(self, summary: Summary) -> None:
        """Write ``summary.json`` and ``report.html``."""
        from dreamfleet.trainers.artifacts.usage import describe
        from dreamfleet.trainers.report.report import write_report

        # A completed run that is resumed measures nothing in this session: its figures are read from the log.
        summary.figures = {**logged_figures(self.run), **summary.figures, **self.scores}
        self.events.add("end", step=summary.steps, reason=summary.exit_reason)
        self.events.close()
        if timeline := read_timeline(read_events(self.run)):
            summary.timeline = timeline.summary()
        self.run.write_text("summary.json", json_text(dataclasses.asdict(summary), indent=1))
        self.flush()
        self.trackers.close(dataclasses.asdict(summary))
        write_report(self.run, describe=describe)
