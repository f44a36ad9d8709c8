"""Executes one whole run on one worker; does not use Ray."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dreamfleet.datasets.errors import Replaced
from dreamfleet.datasets.storage.retry import patience
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.engine import EngineConfig
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.distributed.device import TRAINING, on_device
from dreamfleet.trainers.distributed.membership import CutOff, GroupBroke, Left, Membership, is_broken_group
from dreamfleet.trainers.distributed.pulse import Pulse
from dreamfleet.trainers.engines.passes import Passes, drive
from dreamfleet.trainers.memory.engine_selection import settle_engine
from dreamfleet.trainers.models.family import load_model
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.report.events import open_rank_events
from dreamfleet.trainers.run.build import Load
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.fence import Fence
from dreamfleet.trainers.run.left_spools import store_left_checkpoint
from dreamfleet.trainers.run.restore import newest_checkpoint
from dreamfleet.trainers.run.rounds import MakeEvaluator
from dreamfleet.trainers.run.session import Session
from dreamfleet.trainers.run.stopwatch import Clock
from dreamfleet.trainers.run.summary import Summary


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
    membership: Membership | None = None,
    on_main: Callable[[], None] = lambda: None,
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

    ``membership``: the workers come and go, and it opens their process groups; ``rank`` and ``world`` are then
    ignored. Without it the caller has opened the one group of ``world`` workers. ``on_main`` is called when this
    worker becomes the one that writes the run folder. Raises what :meth:`Membership.next_generation` raises.
    """
    clock = Clock(waited)
    with patience(recipe.storage.patience_seconds), on_device(device, remedies=TRAINING) as settled:
        if membership is None:
            distributed = DistributedContext(rank, world, settled, gpu_share)
        else:  # of this process only, until it has joined a group
            distributed = DistributedContext(device=settled, gpu_share=gpu_share, alone=membership.alone)
        return drive(
            run_steps(
                recipe,
                distributed,
                resume=resume,
                should_stop=should_stop,
                on_progress=on_progress,
                clock=clock,
                pulse=pulse,
                membership=membership,
                on_main=on_main,
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
    membership: Membership | None = None,
    on_main: Callable[[], None] = lambda: None,
    fence: Fence | None = None,
    make_evaluator: MakeEvaluator | None = None,
) -> Passes[Summary]:
    """Train a whole run as :func:`run_worker`; a generator of the passes that it needs, see :func:`drive`.

    ``load`` returns the model that the run trains on; it may share parameters that the run does not train. ``settle``
    returns the recipe with its engine selected, and the reason.
    """
    clock, pulse = clock or Clock(), pulse or Pulse()
    fence = fence or Fence(Storage(recipe.output_dir), None)

    def start() -> Session:
        return _start(
            recipe,
            distributed,
            resume=resume,
            clock=clock,
            settle=settle,
            membership=membership,
            pulse=pulse,
            fence=fence,
            make_evaluator=make_evaluator,
            load=load,
            should_stop=fence.watched(should_stop),
            on_progress=on_progress,
        )

    if membership is None:
        with start() as session:
            yield from session.open()
            return session.finish((yield from session.train()))
    return (yield from _follow(membership, distributed, start, pulse, on_main))


def _follow(
    membership: Membership,
    distributed: DistributedContext,
    start: Callable[[], Session],
    pulse: Pulse,
    on_main: Callable[[], None],
) -> Passes[Summary]:
    """Train in one generation of workers after the other until the run is complete; return its summary.

    A worker that comes late builds its session alone, and then joins the others. If a collective operation fails
    because a worker was lost, the others continue in the next generation with the state that they hold.
    """
    session: Session | None = None
    broke_at: float | None = None
    was_main = False
    try:
        while True:
            try:
                if session is None and membership.alone:
                    session = start()
                    yield from session.warm_up()
                with pulse.during("regroup"):
                    generation = membership.next_generation(
                        done=session.progress.done if session is not None and session.is_open else None,
                        broken=broke_at is not None,
                    )
                    distributed.regroup(membership.rank, len(generation.members))
                    membership.seal_group()
                if distributed.is_main and not was_main:
                    was_main = True
                    on_main()
                if generation.source is None:
                    if session is not None:
                        session.close()
                        session = None
                    session = start()
                    yield from session.open()
                else:
                    if session is None:  # its start broke, while others had just completed theirs
                        raise CutOff("this worker has no state to join the others with")
                    yield from session.join(generation, broke_at=broke_at)
                broke_at = None
                outcome = yield from session.train()
                if outcome.exit_reason != "regroup":
                    return session.finish(outcome)
            except Left:
                if session is not None:
                    session.leave()
                raise
            except Replaced as error:  # a member that the others have cut off; Ray starts another one
                raise CutOff(str(error)) from error
            except Exception as error:
                if not is_broken_group(error):
                    raise
                if session is not None and not session.parts.engine.regroups:
                    raise GroupBroke(f"a worker was lost: {str(error)[:200]}") from error
                broke_at = time.monotonic()
    finally:
        if session is not None:
            session.close(*sys.exc_info())


def _start(
    recipe: Recipe,
    distributed: DistributedContext,
    *,
    resume: bool,
    clock: Clock,
    settle: Callable[[Recipe, DistributedContext], tuple[Recipe, str]],
    membership: Membership | None,
    fence: Fence,
    **options: Any,
) -> Session:
    """Build the session of this rank from the newest checkpoint, or to join other workers if it is alone."""
    run = fence.guarded()
    checkpoints = Checkpoints(run, limit=recipe.train.checkpoints_total_limit, fence=fence)
    found = None
    if resume and not distributed.alone:
        distributed.on_rank_0(partial(store_left_checkpoint, checkpoints, fence))
        found = newest_checkpoint(checkpoints, distributed)
    if not distributed.alone:
        distributed.on_rank_0(partial(fence.begin, step=found.step if found else 0))
    events = open_rank_events(run, 0 if distributed.is_main else 1, attempt=fence.attempt)
    events.add("start", step=found.step if found else 0, seconds=clock.start_up, world=distributed.world)
    recipe, engine_reason = settle(recipe, distributed)
    if membership is not None:
        if distributed.is_main:
            membership.publish(engine=recipe.engine.model_dump(mode="json"), engine_reason=engine_reason)
        elif distributed.alone and (facts := membership.facts):
            engine = EngineConfig.model_validate(facts["engine"])
            recipe, engine_reason = recipe.model_copy(update={"engine": engine}), facts["engine_reason"]
    return Session(
        recipe,
        distributed,
        found=found,
        checkpoints=checkpoints,
        events=events,
        clock=clock,
        engine_reason=engine_reason,
        membership=membership,
        fence=fence,
        **options,
    )
