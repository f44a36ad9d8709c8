"""Executes one whole run on one worker; does not use Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import torch

from dreamfleet.datasets.storage.retry import patience
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.distributed.device import TRAINING, on_device
from dreamfleet.trainers.distributed.pulse import Preempted, Pulse
from dreamfleet.trainers.loop import Hooks, Outcome, Training, drive, train
from dreamfleet.trainers.memory.engine_selection import settle_engine
from dreamfleet.trainers.models.family import load_model
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.report.events import open_rank_events
from dreamfleet.trainers.run.build import Load, Parts, assemble
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.checkpointing import Checkpointing
from dreamfleet.trainers.run.evaluation import training_grid
from dreamfleet.trainers.run.export import export_artifacts
from dreamfleet.trainers.run.fence import Fence
from dreamfleet.trainers.run.recorder import Recorder
from dreamfleet.trainers.run.restore import newest_checkpoint, restore
from dreamfleet.trainers.run.rounds import MakeEvaluator, Rounds, choose_evaluation, make_rounds
from dreamfleet.trainers.run.stages import Stages, make_stages
from dreamfleet.trainers.run.stopwatch import Clock
from dreamfleet.trainers.run.summary import Summary, summarise

log = logging.getLogger(__name__)


def run_worker(
    recipe: Recipe,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    gpu_share: float = 1.0,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    waited: float = 0.0,
    pulse: Pulse | None = None,
    fence: Fence | None = None,
    make_evaluator: MakeEvaluator | None = None,
) -> Summary:
    """Train a whole run on this worker; return the run's summary, which is the same on every rank.

    Every worker of the run calls it with the same recipe. ``gpu_share``: the fraction of the device's memory
    that the run may use, below 1 if other processes use the device too. ``resume``: continue from the newest
    valid checkpoint, if there is one. ``should_stop`` is polled every step; True saves a checkpoint and ends
    the run. ``waited``: the seconds before this worker was started, which count as start-up. ``pulse``: the progress,
    which other threads read. ``fence``: of the process that owns the run folder; by default only a newer attempt is
    noticed. ``make_evaluator``: starts the process that computes the rounds with ``validation.resources``; without it
    the workers compute them. Raises Preempted after a checkpoint if a worker was given notice to leave.
    """
    clock = Clock(waited)
    with patience(recipe.storage.patience_seconds), on_device(device, remedies=TRAINING) as settled:
        return drive(
            run_steps(
                recipe,
                DistributedContext(rank, world, settled, gpu_share),
                resume=resume,
                should_stop=should_stop,
                on_progress=on_progress,
                clock=clock,
                pulse=pulse,
                fence=fence,
                make_evaluator=make_evaluator,
            )
        )


def run_steps(
    recipe: Recipe,
    distributed: DistributedContext,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    clock: Clock | None = None,
    pulse: Pulse | None = None,
    load: Load = load_model,
    settle: Callable[[Recipe, DistributedContext], tuple[Recipe, str]] = settle_engine,
    fence: Fence | None = None,
    make_evaluator: MakeEvaluator | None = None,
) -> Training[Summary]:
    """Train a whole run as :func:`run_worker`; a generator that yields micro-batches and is sent their losses.

    ``load`` returns the model that the run trains on; it may share parameters that the run does not train. ``settle``
    returns the recipe with its engine selected, and the reason.
    """
    clock, pulse = clock or Clock(), pulse or Pulse()
    fence = fence or Fence(Storage(recipe.output_dir), None)
    run, should_stop = fence.guarded(), fence.watched(should_stop)
    checkpoints = Checkpoints(run, limit=recipe.train.checkpoints_total_limit, fence=fence)
    found = newest_checkpoint(checkpoints, distributed) if resume else None
    distributed.on_rank_0(partial(fence.begin, step=found.step if found else 0))
    events = open_rank_events(run, distributed.rank, attempt=fence.attempt)
    events.add("start", step=found.step if found else 0, seconds=clock.start_up, world=distributed.world)
    recipe, engine_reason = settle(recipe, distributed)
    parts = assemble(recipe, distributed, begins=found is None, load=load)
    with closing(events), closing(parts.engine):
        recorder = Recorder(parts, run, on_progress=on_progress, events=events)
        recorder.follow(pulse)
        stages = make_stages(
            recorder.run, distributed.device, recipe.train.profile_steps, rank=distributed.rank
        )
        pulse.on_stage = stages.mark
        evaluation = choose_evaluation(parts, make_evaluator)  # some metrics compare with the untuned model
        start_step = restore(found, parts) if found else 0
        clock.resume(found.meta.get("seconds", {}) if found else {})
        is_new = found is None
        del found  # free its memory: up to three times that of the trainable parameters
        checkpointing = Checkpointing(
            parts, checkpoints, clock, start_step=start_step, after_save=recorder.flush, events=events
        )
        rounds = make_rounds(evaluation, recorder, checkpointing, begins=is_new)
        with checkpointing, closing(rounds):  # completes the saves, also if the run fails
            _open(recorder, checkpointing, engine_reason)
            rounds.complete(start_step)
            clock.ready()
            events.add("ready", step=start_step, seconds=clock.start_up)
            with closing(stages):
                hooks = _make_hooks(rounds, should_stop, pulse, stages)
                outcome = yield from _train(parts, start_step, hooks, recorder)
            with pulse.during("evaluation"):
                rounds.finish(is_complete=outcome.exit_reason == "completed")
            with pulse.during("save"):
                checkpointing.finish()
            recorder.flush()
        if outcome.exit_reason == "interrupted":
            _leave_if_preempted(recorder, outcome.step, pulse, asked=should_stop())
        summary = summarise(parts, outcome, checkpointing, engine_reason)
        _finish(parts, recorder, summary, clock)
    return summary


def _open(recorder: Recorder, checkpointing: Checkpointing, engine_reason: str) -> None:
    """Write the first files of the run folder."""
    parts, start_step = recorder.parts, checkpointing.start_step

    def begin() -> None:
        recorder.open(start_step, engine_reason=engine_reason)
        checkpointing.recall_best(recorder.run)
        if start_step == 0:
            recorder.run.write_bytes("samples/real.png", training_grid(parts))

    parts.distributed.on_rank_0(begin)


def _make_hooks(rounds: Rounds, should_stop: Callable[[], bool], pulse: Pulse, stages: Stages) -> Hooks:
    checkpointing = rounds.checkpointing
    return Hooks(
        log=lambda line: rounds.log({**line, **stages.read(line["step"])} if "loss" in line else line),
        save=checkpointing.save,
        sample=rounds.sample,
        validate=rounds.validate,
        should_stop=lambda: pulse.notice is not None or checkpointing.has_failed or should_stop(),
        saved=lambda: checkpointing.saved,
        is_profiled=stages.is_profiled,
        pulse=pulse,
    )


def _train(parts: Parts, start_step: int, hooks: Hooks, recorder: Recorder) -> Training[Outcome]:
    try:
        return (
            yield from train(
                parts.engine,
                parts.feed.stream(start_step, parts.schedule.total),
                parts.prepare,
                rates=parts.rates,
                schedule=parts.schedule,
                seed=parts.recipe.train.seed,
                start_step=start_step,
                hooks=hooks,
            )
        )
    except BaseException:
        recorder.flush_after_error()  # a failed run keeps its metrics
        raise
    finally:
        hooks.pulse.report()


def _leave_if_preempted(recorder: Recorder, step: int, pulse: Pulse, *, asked: bool) -> None:
    """Raise Preempted on every rank if one was given notice and the user has not asked to stop the run."""
    reason = pulse.notice.reason if pulse.notice else None
    answers = recorder.parts.distributed.gather((asked, reason))
    noticed = [(rank, reason) for rank, (_, reason) in enumerate(answers) if reason]
    if noticed and not any(asked for asked, _ in answers):
        rank, reason = noticed[0]
        recorder.events.add("preemption", step=step, rank=rank, cause=reason)
        recorder.events.close()
        raise Preempted(f"rank {rank} was given notice ({reason}): checkpoint of step {step} saved")


def _finish(parts: Parts, recorder: Recorder, summary: Summary, clock: Clock) -> None:
    """Export the artifacts of a completed run with ``train.export``; write the summary and the report."""
    distributed = parts.distributed

    def export() -> list[str]:
        return export_artifacts(
            parts.recipe,
            parts.method,
            recorder.run.child("exports"),
            step=summary.steps,
            dataset_hash=summary.dataset_hash,
        )

    def close() -> None:
        summary.wall_seconds = summary.start_up_seconds + summary.train_seconds + clock.since_lap()
        recorder.close(summary)

    if summary.exit_reason == "completed" and parts.recipe.train.export:
        with parts.engine.full_weights():  # on every rank: sharded weights are gathered
            summary.exports = distributed.on_rank_0(export)
    distributed.on_rank_0(close)
    distributed.wait()
