"""Executes one whole run on one worker; does not use Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch

from dreamfleet.datasets.errors import CheckpointError, RecipeError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.distributed.agreement import compare
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.distributed.device import TRAINING, on_device
from dreamfleet.trainers.loop import Hooks, Outcome, Training, drive, train
from dreamfleet.trainers.memory.engine_selection import settle_engine
from dreamfleet.trainers.models.family import load_model
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.report.events import open_rank_events
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.build import Load, Parts, assemble
from dreamfleet.trainers.run.checkpoint import Checkpoint, Checkpoints
from dreamfleet.trainers.run.checkpointing import Checkpointing
from dreamfleet.trainers.run.evaluation import Evaluation
from dreamfleet.trainers.run.export import export_artifacts
from dreamfleet.trainers.run.provenance import run_identity
from dreamfleet.trainers.run.recorder import Recorder
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
) -> Summary:
    """Train a whole run on this worker; return the run's summary, which is the same on every rank.

    Every worker of the run calls it with the same recipe. ``gpu_share``: the fraction of the device's memory
    that the run may use, below 1 if other processes use the device too. ``resume``: continue from the newest
    valid checkpoint, if there is one. ``should_stop`` is polled every step; True saves a checkpoint and ends
    the run. ``waited``: the seconds before this worker was started, which count as start-up.
    """
    clock = Clock(waited)
    with on_device(device, remedies=TRAINING) as settled:
        return drive(
            run_steps(
                recipe,
                DistributedContext(rank, world, settled, gpu_share),
                resume=resume,
                should_stop=should_stop,
                on_progress=on_progress,
                clock=clock,
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
    load: Load = load_model,
    settle: Callable[[Recipe, DistributedContext], tuple[Recipe, str]] = settle_engine,
) -> Training[Summary]:
    """Train a whole run as :func:`run_worker`; a generator that yields micro-batches and is sent their losses.

    ``load`` returns the model that the run trains on; it may share parameters that the run does not train. ``settle``
    returns the recipe with its engine selected, and the reason.
    """
    clock = clock or Clock()
    checkpoints = Checkpoints(Storage(recipe.output_dir), limit=recipe.train.checkpoints_total_limit)
    found = newest_checkpoint(checkpoints, distributed) if resume else None
    events = open_rank_events(Storage(recipe.output_dir), distributed.rank)
    events.add("start", step=found.step if found else 0, seconds=clock.start_up, world=distributed.world)
    recipe, engine_reason = settle(recipe, distributed)
    parts = assemble(recipe, distributed, begins=found is None, load=load)
    with closing(events), closing(parts.engine):
        recorder = Recorder(parts, Storage(recipe.output_dir), on_progress=on_progress, events=events)
        evaluation = Evaluation(parts, recorder)  # some metrics compare with the untuned model
        start_step = _restore(found, parts) if found else 0
        clock.resume(found.meta.get("seconds", {}) if found else {})
        del found  # free its memory: up to three times that of the trainable parameters
        checkpointing = Checkpointing(
            parts, checkpoints, clock, start_step=start_step, after_save=recorder.flush
        )
        _open(recorder, checkpointing, evaluation, engine_reason)
        hooks = _make_hooks(recorder, checkpointing, evaluation, should_stop)
        _complete_round(recorder, start_step, hooks)
        clock.ready()
        events.add("ready", step=start_step, seconds=clock.start_up)
        outcome = yield from _train(parts, start_step, hooks, recorder)
        summary = summarise(parts, outcome, checkpointing, engine_reason)
        _finish(parts, recorder, summary, clock)
    return summary


def _open(
    recorder: Recorder, checkpointing: Checkpointing, evaluation: Evaluation, engine_reason: str
) -> None:
    """Write the first files of the run folder; for a new run, evaluate with ``sample_at_first``."""
    parts, start_step = recorder.parts, checkpointing.start_step

    def begin() -> None:
        recorder.open(start_step, engine_reason=engine_reason)
        checkpointing.recall_best(recorder.run)
        if start_step == 0:
            evaluation.write_real_images()

    parts.distributed.on_rank_0(begin)
    if start_step == 0 and parts.recipe.validation.sample_at_first:
        if figures := evaluation.measure():
            recorder.log({"step": 0, **figures})
        evaluation.draw(0)


def _make_hooks(
    recorder: Recorder,
    checkpointing: Checkpointing,
    evaluation: Evaluation,
    should_stop: Callable[[], bool],
) -> Hooks:
    def validate(step: int) -> dict[str, float]:
        if figures := evaluation.measure():
            checkpointing.keep_best(step, figures)
        return figures

    def sample(step: int) -> None:
        evaluation.draw(step)
        checkpointing.keep_best(step, recorder.scores)  # which rank 0 has

    return Hooks(
        log=recorder.log,
        save=checkpointing.save,
        sample=sample,
        validate=validate,
        should_stop=should_stop,
        saved=lambda: checkpointing.saved,
    )


def _complete_round(recorder: Recorder, start_step: int, hooks: Hooks) -> None:
    """Validate the step that a run is resumed from, if the run was killed after its checkpoint and before its round."""
    parts, run = recorder.parts, recorder.run
    if start_step == 0 or not parts.schedule.samples_at(start_step):
        return

    def find() -> tuple[bool, bool]:
        rounds = [line for line in read_metrics(run) if line["step"] == start_step and "loss" not in line]
        return bool(rounds), run.exists(f"samples/step-{start_step:06d}.png")

    is_measured, is_drawn = parts.distributed.on_rank_0(find)
    if not is_measured and (figures := hooks.validate(start_step)):
        hooks.log({"step": start_step, **figures})
    if not is_drawn and parts.recipe.validation.prompts:
        hooks.sample(start_step)


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
    finally:
        recorder.flush()  # also after an error, so that a failed run keeps its metrics


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


def newest_checkpoint(checkpoints: Checkpoints, distributed: DistributedContext) -> Checkpoint | None:
    """Read on every rank the newest checkpoint that is valid on rank 0; return None if there is none.

    Raises CheckpointError on every rank if a rank cannot read it, StorageError if a rank reads different
    content.
    """
    kept: list[Checkpoint | None] = []

    def find() -> int | None:
        kept.append(checkpoints.load_to_continue())
        return kept[0].step if kept[0] is not None else None

    step = distributed.on_rank_0(find)
    if step is None:
        return None
    found = distributed.on_every_rank(lambda: kept[0] if kept else checkpoints.load(step))
    compare(
        {f"the checkpoint of step {step}": distributed.on_every_rank(lambda: checkpoints.digest(step))},
        distributed,
    )
    return found


def _restore(found: Checkpoint, parts: Parts) -> int:
    """Load a checkpoint into a run's parts; return its step.

    Raises CheckpointError if the checkpoint is of another method or does not fit the recipe. Logs a warning
    if dataset, base model, global batch or seed changed.
    """
    recipe, is_main = parts.recipe, parts.distributed.is_main
    name = found.meta.get("method")
    if name != recipe.method.name:
        raise CheckpointError(
            f"the checkpoint of step {found.step} is of {name}, this recipe is for {recipe.method.name}"
        )
    try:
        parts.engine.load_weights(found.learned)
        parts.engine.load_state(found.engine)
        parts.method.steps_before = found.meta.get("steps_before", 0)
    except RecipeError as error:
        raise CheckpointError(f"the checkpoint of step {found.step} does not fit: {error}") from error
    now = run_identity(parts)
    changed = [key for key, value in now.items() if found.meta.get(key, value) != value]
    if changed and is_main:
        log.warning(
            "continuing from step %d although %s changed: the run continues, but not as if it had never stopped",
            found.step,
            ", ".join(changed),
        )
    if is_main:
        log.info("continuing from step %d", found.step)
    return found.step
