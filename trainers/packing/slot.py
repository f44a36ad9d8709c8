"""A slot of a runner: one task, run step by step as the generator of an ordinary run."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any

from dreamfleet.datasets.errors import ResourceError, RunFailed, UserError
from dreamfleet.datasets.storage.retry import patience
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.distributed.device import explain_out_of_memory
from dreamfleet.trainers.driver.progress import log_to_run, watch_for_stop
from dreamfleet.trainers.engines.model_passes import Micro
from dreamfleet.trainers.engines.passes import Pass, Passes
from dreamfleet.trainers.loop import StopTraining
from dreamfleet.trainers.packing.rounds import STOPPED, NewRounds, write_end
from dreamfleet.trainers.packing.task import End, ExitReason, Task, TaskSource
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.run.fence import Fence, Owner
from dreamfleet.trainers.run.run import run_steps
from dreamfleet.trainers.run.summary import Summary

log = logging.getLogger(__name__)

#: The slot whose code is running: its log messages belong to its run.
_running: ContextVar[Slot | None] = ContextVar("running slot", default=None)


def in_slot() -> bool:
    """Return whether the code of a slot is running, whose log messages are in its ``run.log``."""
    return _running.get() is not None


class Slot:
    """One task in progress; :attr:`pending` is the pass that it waits for, :attr:`end` is set when it has ended.

    ``options`` are those of :func:`run_steps`. ``should_stop``: whether all tasks save a checkpoint and end. ``owner``:
    of the folder that the task's is in.
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        source: TaskSource,
        distributed: DistributedContext,
        *,
        should_stop: Callable[[], bool],
        owner: Owner | None = None,
        **options: Any,
    ):
        self.task, self.source = task, source
        self.pending: Pass | None = None
        self.end: End | None = None
        self.is_undecided = False  # the source has not decided yet whether the task continues after a round
        self._started, self._is_stopped = time.monotonic(), False  # stopped by the source
        fence = Fence(Storage(recipe.output_dir), owner)
        self._run, self._resources = fence.guarded(), ExitStack()
        self._rounds = NewRounds(self._run, task.figures, last_step=task.last_step)
        self._resources.enter_context(patience(recipe.storage.patience_seconds))
        self._resources.enter_context(
            log_to_run(self._run, verbose=True, when=lambda: _running.get() in (self, None))
        )
        stopped_here = self._resources.enter_context(watch_for_stop(self._run))
        self._training: Passes[Summary] = run_steps(
            recipe,
            distributed,
            resume=True,
            should_stop=lambda: should_stop() or stopped_here(),
            on_progress=self._rounds.note,
            fence=fence,
            **options,
        )
        self.advance(None)

    @property
    def is_ready(self) -> bool:
        """Whether its pass is to be computed: a run that waits for a decision completes its measurements before."""
        return self.pending is not None and not self._is_open

    @property
    def _is_open(self) -> bool:
        """Whether it is undecided if the next step is taken. A round that an earlier attempt began is completed."""
        return self.is_undecided and isinstance(self.pending, Micro)

    def advance(self, result: Any) -> None:
        """Continue the run with the result of :attr:`pending`, or throw an exception into it; None starts it."""
        token = _running.set(self)
        try:
            with explain_out_of_memory():
                if isinstance(result, Exception):
                    self.pending = self._training.throw(result)
                else:
                    self.pending = next(self._training) if result is None else self._training.send(result)
            self._report_rounds()
        except StopIteration as stop:
            self._report_rounds(last=True)
            summary: Summary = stop.value
            reason: ExitReason = summary.exit_reason  # type: ignore[assignment]
            if self._is_stopped:
                reason, summary = "stopped", write_end(self._run, summary, STOPPED)
            self._finish(End(reason, summary=dataclasses.asdict(summary)))
        except Exception as error:  # noqa: BLE001 - a fault in one training must not end the others
            self._fail(error)
        finally:
            _running.reset(token)

    def ask(self) -> None:
        """Ask the source for its decision after a round, if it is open."""
        if self._is_open and (stops := self.source.decision(self.task)) is not None:
            self.is_undecided = False
            if stops:
                self._is_stopped = True
                self.advance(StopTraining())

    def abandon(self) -> None:
        """End the run without a checkpoint, as its pass was lost with an error of another kind."""
        self._training.close()
        self._resources.close()

    def _report_rounds(self, *, last: bool = False) -> None:
        for figures in self._rounds.take():
            self.source.on_round(self.task, figures)
            self.is_undecided = not last

    def _fail(self, error: Exception) -> None:
        known = isinstance(error, UserError | RunFailed)
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            first = (str(error).splitlines() or ["MemoryError"])[0]
            error = ResourceError(f"the machine ran out of memory ({first})")
            known = True
        if known:
            log.error("%s", error)  # not the exception itself, whose traceback would keep the run in memory
        else:
            log.error("%s", error, exc_info=error)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        self._finish(End("failed", error=text, kind=type(error).__name__ if known else "RunFailed"))

    def _finish(self, end: End) -> None:
        self.pending = None
        self._training.close()
        self._resources.close()
        self.end = dataclasses.replace(end, seconds=time.monotonic() - self._started)
