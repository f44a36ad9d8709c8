"""One run from beginning to end, as each worker does it: no Ray in here."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from typing import Any

import torch

from dreamfleet.datasets.errors import CheckpointError, RecipeError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.engines import engine_spec
from dreamfleet.trainers.distributed.agreement import compare
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.distributed.device import TRAINING, on_device
from dreamfleet.trainers.loop import train
from dreamfleet.trainers.memory.engine_selection import settle_engine
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.run.build import Parts, assemble
from dreamfleet.trainers.run.checkpoint import Checkpoint, Checkpoints
from dreamfleet.trainers.run.provenance import run_identity
from dreamfleet.trainers.run.recorder import Recorder
from dreamfleet.trainers.run.run_lock import is_used
from dreamfleet.trainers.run.stopwatch import Clock
from dreamfleet.trainers.run.summary import Summary
from dreamfleet.trainers.run.versions import versions

log = logging.getLogger(__name__)


def open_run_folder(recipe: Recipe, *, resume: bool) -> Storage:
    """Return the run folder, refusing one in use unless ``resume``.

    Raises RecipeError for a folder that holds something else or another run, CheckpointError for a run of
    another method.
    """
    run = Storage(recipe.output_dir)
    if not is_used(run):
        return run
    if not run.exists("recipe.yaml"):
        raise RecipeError(
            f"output_dir {recipe.output_dir} is not empty and holds no run; give another output_dir"
        )
    if not resume:
        raise RecipeError(
            f"output_dir {recipe.output_dir} holds a run already; continue it with --resume, or give another output_dir"
        )
    import yaml

    before = yaml.safe_load(run.read_text("recipe.yaml"))["method"]["name"]
    if before != recipe.method.name:
        raise CheckpointError(
            f"output_dir {recipe.output_dir} holds a run of {before}, and this recipe is for {recipe.method.name}; "
            f"give another output_dir"
        )
    return run


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
    """Do a whole run on this worker; every worker of the run calls it with the same recipe.

    ``gpu_share``: the part of the device's memory that the run may fill, where others use it as well. ``waited``:
    the seconds that passed before this worker had its turn, for the start-up figure. Returns the same summary on every
    rank.
    """
    clock = Clock(waited)
    with on_device(device, remedies=TRAINING) as settled:
        return _run_whole(
            recipe,
            DistributedContext(rank, world, settled, gpu_share),
            resume=resume,
            clock=clock,
            should_stop=should_stop,
            on_progress=on_progress,
        )


def _run_whole(
    recipe: Recipe,
    distributed: DistributedContext,
    *,
    resume: bool,
    clock: Clock,
    should_stop: Callable[[], bool],
    on_progress: Callable[[dict[str, Any]], None] | None,
) -> Summary:
    checkpoints = Checkpoints(Storage(recipe.output_dir), limit=recipe.train.checkpoints_total_limit)
    found = newest_checkpoint(checkpoints, distributed) if resume else None
    recipe, engine_reason = settle_engine(recipe, distributed)
    parts = assemble(recipe, distributed, begins=found is None)
    try:
        start_step = _restore(found, recipe, parts, distributed) if found else 0
        clock.resume(found.meta.get("seconds", {}) if found else {})
        del found  # as large as what learns, three times over
        return _run(
            recipe,
            parts,
            distributed,
            checkpoints,
            start_step,
            engine_reason=engine_reason,
            clock=clock,
            should_stop=should_stop,
            on_progress=on_progress,
        )
    finally:
        parts.engine.close()


def _run(
    recipe: Recipe,
    parts: Parts,
    distributed: DistributedContext,
    checkpoints: Checkpoints,
    start_step: int,
    *,
    engine_reason: str,
    clock: Clock,
    should_stop: Callable[[], bool],
    on_progress: Callable[[dict[str, Any]], None] | None,
) -> Summary:
    run = Storage(recipe.output_dir)
    recorder = Recorder(
        recipe, parts, distributed, run, checkpoints, start_step, on_progress, engine_reason, clock
    )
    recorder.open()
    clock.ready()
    try:
        outcome = train(
            parts.method,
            parts.engine,
            parts.feed.stream(start_step, parts.schedule.total),
            parts.prepare,
            rates=parts.rates,
            schedule=parts.schedule,
            seed=recipe.train.seed,
            start_step=start_step,
            rank=distributed.rank,
            hooks=recorder.hooks(should_stop),
        )
    finally:
        recorder.flush()  # also what a run that fails has measured
    seconds = clock.lap()
    summary = Summary(
        run=recipe.run_name,
        method=recipe.method.name,
        exit_reason=outcome.exit_reason,
        steps=outcome.step,
        start_step=start_step,
        images_seen=outcome.step * parts.global_batch,
        workers=distributed.world,
        global_batch=parts.global_batch,
        device=torch.cuda.get_device_name(distributed.device)
        if distributed.device.type == "cuda"
        else platform.processor() or "cpu",
        wall_seconds=0.0,
        start_up_seconds=seconds["start_up"],
        train_seconds=seconds["train"],
        figures=outcome.figures,
        best_checkpoint=recorder.best.name,
        bad_files=[
            bad._asdict()
            for bad in distributed.all_gather_unique([*parts.sets.instances.bad, *parts.feed.bad])
        ],
        dataset_hash=parts.sets.instances.content_hash,
        base_model=parts.method.base.name,
        base_model_hash=parts.method.base.content_hash,
        versions=versions(),
        engine=f"{engine_spec(recipe.engine).summary(recipe.engine)} ({engine_reason})",
    )
    recorder.close(summary, outcome.step)
    distributed.wait()
    return summary


def newest_checkpoint(checkpoints: Checkpoints, distributed: DistributedContext) -> Checkpoint | None:
    """Read the newest checkpoint that rank 0 finds whole, on every rank; None when there is none.

    Raises CheckpointError on every rank when one of them cannot read it, StorageError when one reads another.
    """
    kept: list[Checkpoint | None] = []

    def find() -> int | None:
        kept.append(checkpoints.load_latest())
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


def _restore(found: Checkpoint, recipe: Recipe, parts: Parts, distributed: DistributedContext) -> int:
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
    now = run_identity(recipe, parts)
    changed = [key for key, value in now.items() if found.meta.get(key, value) != value]
    if changed and distributed.is_main:
        log.warning(
            "continuing from step %d although %s changed: the run goes on, but not as if it had never stopped",
            found.step,
            ", ".join(changed),
        )
    if distributed.is_main:
        log.info("continuing from step %d", found.step)
    return found.step
