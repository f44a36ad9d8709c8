"""Logs the line of metrics that a broken process group left out."""

from __future__ import annotations

from dreamfleet.trainers.loop import Progress
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.recorder import Recorder


def complete_line(recorder: Recorder, progress: Progress) -> None:
    """Log the line that is due after the finished steps and was not logged, from what one rank knows of it.

    Every rank calls this.
    """
    distributed, done = recorder.parts.distributed, progress.done
    assert done is not None
    if not progress.schedule.logs_at(done):
        return
    lines = distributed.gather(progress.line_alone())

    def complete() -> None:
        recorder.flush()
        written = any(line["step"] == done and "loss" in line for line in read_metrics(recorder.run))
        if not written and (line := next(filter(None, lines), None)):
            recorder.log(line)

    distributed.on_rank_0(complete)
