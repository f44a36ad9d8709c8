"""Publishes the metrics and events of runs on a cluster as Ray metrics, which Prometheus collects."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.report.events import read_events
from dreamfleet.trainers.report.observers import observe_runs
from dreamfleet.trainers.report.timeline import read_timeline

PREFIX = "dreamfleet_"
READ_SECONDS = 15.0
READ_SHARE = 500  # pause after a read in the step loop, in times of its duration
log = logging.getLogger(__name__)


class Shown(NamedTuple):
    """A value of ``metrics.jsonl`` as a gauge: its name without prefix, description, and whether every rank has it."""

    name: str
    description: str
    each_rank: bool = False


GAUGES = {
    "step": Shown("step", "Finished optimizer steps."),
    "total_steps": Shown("total_steps", "Optimizer steps of the whole run."),
    "loss": Shown("loss", "Training loss, the mean since the last value."),
    "grad_norm": Shown("gradient_norm", "Norm of the gradient of the newest step."),
    "images_per_second": Shown("images_per_second", "Images per second of all workers."),
    "step_seconds": Shown("step_seconds", "Seconds of a step.", True),
    "data_wait_seconds": Shown("data_wait_seconds", "Seconds of a step that wait for data.", True),
    "forward_backward_seconds": Shown("forward_backward_seconds", "Seconds of the passes of a step.", True),
    "optimizer_seconds": Shown(
        "optimizer_seconds", "Seconds of the sum of gradients over the workers and the optimizer.", True
    ),
    "data_wait_fraction": Shown("data_wait_fraction", "Part of a step that waits for data.", True),
    "peak_memory_bytes": Shown(
        "peak_memory_bytes", "Peak memory: of the GPU, or on a CPU of the process.", True
    ),
}
COUNTERS = {
    "failure": ("failures_total", "Failures, by cause.", "cause"),
    "regroup": ("regroups_total", "Changes of the group of workers without a restart, by cause.", "cause"),
    "preemption": ("preemptions_total", "Preemption notices.", "cause"),
    "hang": ("hangs_total", "Workers that hung.", "cause"),
    "save_retry": ("save_retries_total", "Attempts to upload a checkpoint that failed.", "cause"),
    "start": ("starts_total", "Starts of a worker group.", "cause"),
}
LABELS = ("run", "rank", "node")


class RayMetrics:
    """An observer that publishes what it is told as ``ray_dreamfleet_*``, labelled by run, rank and node."""

    def __init__(self) -> None:
        import ray

        self.node = ray.util.get_node_ip_address()
        self._shares = _EffectiveTime()

    def __call__(self, run: Storage, rank: int | None, line: Mapping[str, Any]) -> None:
        """Publish a line of metrics or an event."""
        labels = {
            "run": run.url.rstrip("/").rpartition("/")[2],
            "rank": "" if rank is None else str(rank),
            "node": self.node,
        }
        kind = line.get("kind")
        if kind is None:
            self._show_metrics(line, labels)
            return
        self._show_event(str(kind), line, labels)
        if rank == 0:
            self._shares.update(run, labels)

    def _show_metrics(self, line: Mapping[str, Any], labels: dict[str, str]) -> None:
        is_first = labels["rank"] == "0"
        for key, value in line.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            if shown := GAUGES.get(key):
                if is_first or shown.each_rank:
                    gauge(shown.name, shown.description).set(float(value), tags=labels)
            elif is_first:
                text = "Figures of validation rounds and parts of the loss, by name."
                gauge("figure", text, "name").set(float(value), tags={**labels, "name": key})

    def _show_event(self, kind: str, line: Mapping[str, Any], labels: dict[str, str]) -> None:
        if kind == "save":
            for where, key in (("loop", "seconds"), ("background", "background_seconds")):
                if (seconds := line.get(key)) is not None:
                    save_seconds().observe(float(seconds), tags={**labels, "where": where})
        if kind == "uploads":
            text = "Checkpoints that are written or uploaded in the background."
            gauge("uploads_waiting", text).set(float(line["waiting"]), tags=labels)
        if kind in COUNTERS:
            name, description, label = COUNTERS[kind]
            cause = str(line.get(label) or line.get("error") or "none").partition("\n")[0][:80]
            counter(name, description, label).inc(1, tags={**labels, label: cause})


class _EffectiveTime:
    """Publishes the effective training time of runs from their events, every READ_SECONDS at most.

    A folder on disk is read at once, in at most 1 / READ_SHARE of the time; a thread reads a bucket.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._read_at: dict[str, float] = {}  # by the address of the run folder

    def update(self, run: Storage, labels: dict[str, str]) -> None:
        """Read the events and publish the share, unless that is being done or was done lately."""
        now = time.monotonic()
        is_busy = self._thread is not None and self._thread.is_alive()
        if is_busy or now - self._read_at.get(run.url, -READ_SECONDS) < READ_SECONDS:
            return
        self._read_at[run.url] = now
        shown = gauge(
            "effective_training_time", "Part of the wall time that was spent on steps that counted."
        )
        if run.is_local:
            self._publish(run, labels, shown)
            took = time.monotonic() - now
            self._read_at[run.url] += took * READ_SHARE  # the events of days take longer to read
            return
        self._thread = threading.Thread(
            target=self._publish, args=(run, labels, shown), daemon=True, name="effective-time"
        )
        self._thread.start()

    @staticmethod
    def _publish(run: Storage, labels: dict[str, str], shown: Any) -> None:
        try:
            timeline = read_timeline(read_events(run))
        except UserError as error:  # storage that does not answer; the next time may succeed
            log.debug("the events cannot be read: %s", error)
            return
        if timeline is not None and timeline.effective is not None:
            shown.set(timeline.effective, tags=labels)


def publish_runs() -> None:
    """Publish the runs of this process, a process of Ray, from now on.

    Does nothing with RAY_TRAIN_METRICS_ENABLED=0, as in a private Ray, whose metrics nobody collects.
    """
    if os.environ.get("RAY_TRAIN_METRICS_ENABLED") != "0":
        observe_runs(_publisher())


@cache
def _publisher() -> RayMetrics:
    return RayMetrics()


@cache
def gauge(name: str, description: str, *more: str) -> Any:
    """Return the gauge called ``name``, with the labels of LABELS and ``more``."""
    from ray.util.metrics import Gauge

    return Gauge(PREFIX + name, description=description, tag_keys=(*LABELS, *more))


@cache
def counter(name: str, description: str, *more: str) -> Any:
    """Return the counter called ``name``, with the labels of LABELS and ``more``."""
    from ray.util.metrics import Counter

    return Counter(PREFIX + name, description=description, tag_keys=(*LABELS, *more))


@cache
def save_seconds() -> Any:
    """Return the histogram of the seconds that saves take, in the step loop and in the background."""
    from ray.util.metrics import Histogram

    return Histogram(
        PREFIX + "save_seconds",
        description="Seconds of a save: where=loop delays training, where=background does not.",
        boundaries=[0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 900],
        tag_keys=(*LABELS, "where"),
    )
