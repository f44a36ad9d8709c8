"""One run on one rank between its build and its end: training, rounds of validation, and the change of its workers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.distributed.membership import Membership
from dreamfleet.trainers.distributed.pulse import Preempted, Pulse
from dreamfleet.trainers.distributed.roster import Generation
from dreamfleet.trainers.engines.passes import Passes, drive
from dreamfleet.trainers.loop import Hooks, Outcome, Progress, train
from dreamfleet.trainers.models.family import load_model
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.report.events import EventLog, open_rank_events
from dreamfleet.trainers.run.build import Load, assemble
from dreamfleet.trainers.run.checkpoint import Checkpoint, Checkpoints
from dreamfleet.trainers.run.checkpointing import Checkpointing
from dreamfleet.trainers.run.evaluation import Evaluation, training_grid
from dreamfleet.trainers.run.export import export_artifacts
from dreamfleet.trainers.run.fence import Fence, unless_replaced
from dreamfleet.trainers.run.recorder import Recorder
from dreamfleet.trainers.run.restore import restore
from dreamfleet.trainers.run.rounds import MakeEvaluator, choose_evaluation, make_rounds
from dreamfleet.trainers.run.share_state import share_state
from dreamfleet.trainers.run.stages import make_stages
from dreamfleet.trainers.run.stopwatch import Clock
from dreamfleet.trainers.run.summary import Summary, summarise
from dreamfleet.trainers.run.unlogged import complete_line

log = logging.getLogger(__name__)


class Session:
    """The parts of a run on this rank, and what records, evaluates and saves them.

    ``found``: the checkpoint that the run continues from. With ``distributed.alone`` the session is built to join
    workers that train already: it writes nothing, and gets its state from one of them in :meth:`join`.
    """

    def __init__(
        self,
        recipe: Recipe,
        distributed: DistributedContext,
        *,
        found: Checkpoint | None,
        checkpoints: Checkpoints,
        events: EventLog,
        clock: Clock,
        engine_reason: str,
        pulse: Pulse,
        should_stop: Callable[[], bool] = lambda: False,
        fence: Fence,
        membership: Membership | None = None,
        make_evaluator: MakeEvaluator | None = None,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        load: Load = load_model,
    ):
        self.recipe, self.distributed, self.clock = recipe, distributed, clock
        self.engine_reason, self.pulse, self.membership = engine_reason, pulse, membership
        self.should_stop, self.fence = should_stop, fence
        self.is_open = False  # whether the state is that of the run: it has started, or was received
        begins = found is None and not distributed.alone
        self.parts = parts = assemble(recipe, distributed, begins=begins, load=load)
        with ExitStack() as undo:
            undo.enter_context(closing(parts.engine))
            self.recorder = Recorder(parts, fence.guarded(), on_progress=on_progress, events=events)
            self.recorder.follow(pulse)
            self.stages = make_stages(
                self.recorder.run, distributed.device, recipe.train.profile_steps, rank=distributed.rank
            )
            pulse.on_stage = self.stages.mark
            self.evaluation = choose_evaluation(parts, make_evaluator)
            if isinstance(self.evaluation, Evaluation) and not begins:
                drive(self.evaluation.begin())  # some metrics compare with the untuned model
            start_step = restore(found, parts) if found else 0
            clock.resume(found.meta.get("seconds", {}) if found else {})
            self.checkpointing = Checkpointing(
                parts,
                checkpoints,
                clock,
                start_step=start_step,
                after_save=self.recorder.flush,
                events=events,
            )
            self.rounds = make_rounds(self.evaluation, self.recorder, self.checkpointing, begins=begins)
            undo.enter_context(self.checkpointing)  # completes the saves, also if the run fails
            undo.enter_context(closing(self.rounds))
            self.hooks = self._make_hooks()
            self.progress = Progress(parts.engine, parts.schedule, start_step, self.hooks)
            self._release = undo.pop_all()

    @property
    def done(self) -> int:
        """The number of finished optimizer steps of the state that this rank holds."""
        assert self.progress.done is not None
        return self.progress.done

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close(*error)

    def close(self, *error: Any) -> None:
        """Complete the saves, release the engine and close the events; ``error``: as a context's, if there is one."""
        self._release.__exit__(*(error or (None, None, None)))
        self.recorder.events.close()

    def open(self) -> Passes[None]:
        """Write the first files of the run folder, and compute the validation rounds that are due at the start."""
        if isinstance(self.evaluation, Evaluation):
            yield from self.evaluation.begin()
        recorder, start_step = self.recorder, self.checkpointing.start_step

        def begin() -> None:
            recorder.open(start_step, engine_reason=self.engine_reason)
            self.checkpointing.recall_best(recorder.run)
            if start_step == 0:
                recorder.run.write_bytes("samples/real.png", training_grid(self.parts))

        self.distributed.on_rank_0(begin)
        yield from self.rounds.complete(start_step)
        self.is_open = True
        self.clock.ready()
        recorder.events.add("ready", step=start_step, seconds=self.clock.start_up)

    def train(self) -> Passes[Outcome]:
        """Train until the run is complete, is to stop, or its workers are to regroup."""
        parts = self.parts
        try:
            return (
                yield from train(
                    parts.engine,
                    parts.feed.stream(self.done, parts.schedule.total),
                    parts.prepare,
                    rates=parts.rates,
                    schedule=parts.schedule,
                    seed=parts.recipe.train.seed,
                    start_step=self.done,
                    hooks=self.hooks,
                    progress=self.progress,
                )
            )
        except BaseException:
            self.recorder.flush_after_error()  # a failed run keeps its metrics
            raise
        finally:
            self.pulse.report()

    def warm_up(self) -> Passes[None]:
        """Run one forward and backward pass whose result is dropped, before the other workers wait for this one."""
        parts = self.parts
        batch = next(parts.feed.stream(0, 1))
        yield from self.progress.warm_up(batch, parts.prepare, seed=parts.recipe.train.seed)

    def join(self, generation: Generation, *, broke_at: float | None) -> Passes[None]:
        """Continue with the workers of a new generation, whose process group is open.

        Members whose state is older than the newest get it from a member that holds it. A new rank 0 takes over the
        run folder. If the generation before broke, the round of validation and saving that it left unfinished is
        completed. ``broke_at``: when this rank noticed that, by the monotonic clock.
        """
        parts, distributed = self.parts, self.distributed
        self.is_open = True
        began = time.monotonic() if broke_at is None else broke_at
        parts.engine.regroup(distributed.rank, distributed.world)
        if generation.stale:
            share_state(parts, self.checkpointing, self.progress, generation)
        takes_over = distributed.is_main and not self.recorder.is_open
        if takes_over:
            self._take_over()
        self.checkpointing.regroup(took_over=takes_over)
        if isinstance(self.evaluation, Evaluation):
            self.evaluation.regroup()
        seconds = time.monotonic() - began
        if distributed.is_main:
            log.info(
                "%s: continuing with %d workers at step %d after %.1f s",
                generation.cause,
                distributed.world,
                self.done,
                seconds,
            )
        self.recorder.events.add(
            "regroup",
            step=self.done,
            seconds=seconds,
            generation=generation.number,
            world=distributed.world,
            cause=generation.cause,
            mechanism="survivors",
            joined=list(generation.joined),
            lost=list(generation.lost),
            left=list(generation.left),
        )
        if generation.broke and self.done > 0:
            complete_line(self.recorder, self.progress)
            if parts.schedule.saves_at(self.done):
                self.checkpointing.save(self.done)
            yield from self.rounds.complete(self.done)

    def finish(self, outcome: Outcome) -> Summary:
        """Export the artifacts of a completed run with ``train.export``; write the summary and the report."""
        parts, distributed, recorder = self.parts, self.distributed, self.recorder
        self.stages.close()
        with self.pulse.during("evaluation"):
            self.rounds.finish(is_complete=outcome.exit_reason == "completed")
        with self.pulse.during("save"):
            self.checkpointing.finish()
        recorder.flush()
        if outcome.exit_reason == "interrupted":
            self._leave_if_preempted(outcome.step)
        summary = summarise(parts, outcome, self.checkpointing, self.engine_reason)

        def export() -> list[str]:
            return export_artifacts(
                parts.recipe,
                parts.method,
                recorder.run.child("exports"),
                step=summary.steps,
                dataset_hash=summary.dataset_hash,
            )

        def close() -> None:
            summary.wall_seconds = summary.start_up_seconds + summary.train_seconds + self.clock.since_lap()
            recorder.close(summary)

        if summary.exit_reason == "completed" and parts.recipe.train.export:
            with parts.engine.full_weights():  # on every rank: sharded weights are gathered
                summary.exports = distributed.on_rank_0(export)
        distributed.on_rank_0(close)
        distributed.wait()
        return summary

    def leave(self) -> None:
        """Complete what this worker writes before it leaves, unless the next writer, which has it too, has begun."""
        with unless_replaced():
            self.checkpointing.saves.finish()
            self.recorder.flush()

    def _make_hooks(self) -> Hooks:
        return Hooks(
            log=self._log,
            save=self.checkpointing.save,
            sample=self.rounds.sample,
            validate=self.rounds.validate,
            should_stop=self._must_stop,
            should_regroup=self._wants_regroup,
            should_save=lambda: self.pulse.notice is not None,
            saved=lambda: self.checkpointing.saved,
            is_profiled=self.stages.is_profiled,
            pulse=self.pulse,
        )

    def _log(self, line: dict[str, Any]) -> None:
        times = self.stages.read(line["step"]) if "loss" in line else {}
        self.rounds.log({**line, **times})

    def _must_stop(self) -> bool:
        """Return whether the run is to stop: on request, if a save failed for good, or with its last worker."""
        noticed = self.pulse.notice is not None and not self._can_leave
        return self.should_stop() or self.checkpointing.has_failed or noticed

    @property
    def _can_leave(self) -> bool:
        """Whether other workers would continue without this one."""
        return self.membership is not None and self.distributed.world > 1 and self.parts.engine.regroups

    def _wants_regroup(self) -> bool:
        """Return whether a worker waits to join or to leave; ask to leave if this one was given notice."""
        if self.membership is None:
            return False
        if self.pulse.notice is not None and self._can_leave:
            self.membership.leave(self.pulse.notice.reason)
        return self.membership.wants_regroup()

    def _leave_if_preempted(self, step: int) -> None:
        """Raise Preempted on every rank if one was given notice and the user has not asked to stop the run."""
        reason = self.pulse.notice.reason if self.pulse.notice else None
        answers = self.distributed.gather((self.should_stop(), reason))
        noticed = [(rank, reason) for rank, (_, reason) in enumerate(answers) if reason]
        if noticed and not any(asked for asked, _ in answers):
            rank, reason = noticed[0]
            self.recorder.events.add("preemption", step=step, rank=rank, cause=reason)
            self.recorder.events.close()
            raise Preempted(f"rank {rank} was given notice ({reason}): checkpoint of step {step} saved")

    def _take_over(self) -> None:
        """Become the rank that writes the run folder, after the one before was lost or left."""
        self.fence.begin(step=self.done)
        self.recorder.events = open_rank_events(self.recorder.run, 0, attempt=self.fence.attempt)
        self.checkpointing.saves.events = self.recorder.events
        self.recorder.take_over(self.done)
        self.checkpointing.recall_best(self.recorder.run)
