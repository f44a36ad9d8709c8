"""Completes the round of a step (its metrics, checkpoint, validation and previews) that was cut off."""

from __future__ import annotations

from dreamfleet.trainers.loop import Hooks, Progress
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.recorder import Recorder


def complete_line(recorder: Recorder, progress: Progress) -> None:
    """Log the line of metrics that a broken process group left out, from what one rank knows of it.

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


def complete_round(recorder: Recorder, hooks: Hooks, done: int) -> None:
    """Save and validate step ``done``, if the run was cut off after the step and before that; every rank calls this."""
    parts = recorder.parts
    if done == 0:
        return
    if parts.schedule.saves_at(done):
        hooks.save(done)
    if not parts.schedule.samples_at(done):
        return

    def find() -> tuple[bool, bool]:
        recorder.flush()
        run = recorder.run
        rounds = [line for line in read_metrics(run) if line["step"] == done and "loss" not in line]
        return bool(rounds), run.exists(f"samples/step-{done:06d}.png")

    is_measured, is_drawn = parts.distributed.on_rank_0(find)
    if not is_measured and (figures := hooks.validate(done)):
        hooks.log({"step": done, **figures})
    if not is_drawn and parts.recipe.validation.prompts:
        hooks.sample(done)
