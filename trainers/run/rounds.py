"""The validation rounds of a run: computed by its workers, or by another process while the training continues."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from dreamfleet.trainers.engines.passes import Passes, no_passes
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.build import Parts
from dreamfleet.trainers.run.checkpointing import Checkpointing
from dreamfleet.trainers.run.evaluation import Evaluation, Previews
from dreamfleet.trainers.run.recorder import Recorder

log = logging.getLogger(__name__)
MOST_WAITING = 2  # rounds that another process has not finished; the training waits before it starts a third


@dataclass(frozen=True)
class RoundResult:
    """The result of one validation round, or the ``error`` that prevented it."""

    step: int
    figures: Mapping[str, float] = field(default_factory=dict)
    previews: Previews | None = None
    seconds: float = 0.0
    error: str | None = None


class Evaluator(Protocol):
    """Computes validation rounds in another process, from the run's checkpoints; rank 0 only."""

    @property
    def waiting(self) -> int:
        """The number of rounds that were started and not returned."""

    def start(self, step: int) -> None:
        """Compute the round of ``step`` as soon as its checkpoint is complete; of step 0 with the untuned model."""

    def finished(self, *, wait: bool = False) -> list[RoundResult]:
        """Return the results that were not returned before; ``wait`` for the oldest one if there is none."""

    def close(self) -> None:
        """End the other process."""


#: Starts an evaluator; the argument is false if the run continues from a checkpoint.
MakeEvaluator = Callable[[bool], Evaluator]


class Rounds(ABC):
    """The validation rounds of a run. Every rank calls each method.

    The first call is :meth:`complete`, after the checkpoint was loaded.
    """

    def __init__(self, recorder: Recorder, checkpointing: Checkpointing):
        self.recorder, self.checkpointing = recorder, checkpointing
        self.parts: Parts = recorder.parts

    @abstractmethod
    def complete(self, start_step: int) -> Passes[None]:
        """Compute the rounds that are due at the start: of step 0, or those that an earlier session left out."""

    @abstractmethod
    def validate(self, step: int) -> Passes[dict[str, float]]:
        """Measure the held-out images and the model after ``step``; return the figures if they are known already."""

    @abstractmethod
    def sample(self, step: int) -> None:
        """Generate, score and write the previews of ``step``."""

    def log(self, line: dict[str, Any]) -> None:
        """Log a line of metrics of the training."""
        self.recorder.log(line)

    @abstractmethod
    def finish(self, *, is_complete: bool) -> None:
        """Wait for the last rounds of a completed run."""

    @abstractmethod
    def close(self) -> None:
        """Release the other process, if there is one."""


class OwnRounds(Rounds):
    """Rounds that the workers compute between two steps."""

    def __init__(self, evaluation: Evaluation, recorder: Recorder, checkpointing: Checkpointing):
        super().__init__(recorder, checkpointing)
        self.evaluation = evaluation

    def complete(self, start_step: int) -> Passes[None]:
        parts = self.parts
        if start_step == 0:
            if parts.recipe.validation.sample_at_first:
                if figures := (yield from self.evaluation.measure()):
                    self.recorder.log({"step": 0, **figures})
                self._draw(0)
            return
        if not parts.schedule.samples_at(start_step):
            return
        is_measured, is_drawn = parts.distributed.on_rank_0(lambda: find_round(self.recorder, start_step))
        if not is_measured and (figures := (yield from self.validate(start_step))):
            self.recorder.log({"step": start_step, **figures})
        if not is_drawn and parts.recipe.validation.prompts:
            self.sample(start_step)

    def validate(self, step: int) -> Passes[dict[str, float]]:
        if figures := (yield from self.evaluation.measure()):
            self.checkpointing.keep_best(step, figures)
        return figures

    def sample(self, step: int) -> None:
        self._draw(step)
        self.checkpointing.keep_best(step, self.recorder.scores)  # which rank 0 has

    def finish(self, *, is_complete: bool) -> None:
        """Do nothing: every round is finished when the next step begins."""

    def close(self) -> None:
        """Do nothing: there is no other process."""

    def _draw(self, step: int) -> None:
        previews = self.evaluation.draw(step)

        def write() -> None:
            if previews is not None:
                self.recorder.write_previews(step, previews)

        self.parts.distributed.on_rank_0(write)


class RemoteRounds(Rounds):
    """Rounds that another process computes from checkpoints. The results are logged with their step, some steps later.

    Every round needs a checkpoint. It is kept until the round is finished, and then only if it is the best one or if
    the schedule saves that step. Rank 0 starts the other process at its first round; a worker that becomes rank 0 later
    also starts the rounds that the one before has left. ``begins``: False if the run continues from a checkpoint.
    """

    def __init__(
        self, make_evaluator: MakeEvaluator, recorder: Recorder, checkpointing: Checkpointing, *, begins: bool
    ):
        super().__init__(recorder, checkpointing)
        self.make_evaluator, self.begins = make_evaluator, begins
        self.evaluator: Evaluator | None = None
        self._started = set[int]()

    def complete(self, start_step: int) -> Passes[None]:
        def start() -> None:
            if start_step > 0:
                self._start_missing(start_step)
            elif self.parts.recipe.validation.sample_at_first:
                self._start(0)

        self.parts.distributed.on_rank_0(start)
        return no_passes(None)

    def validate(self, step: int) -> Passes[dict[str, float]]:
        def start() -> None:
            if self.evaluator is None:
                self._start_missing(step - 1)
            self._start(step)

        self.checkpointing.save(step)
        self.parts.distributed.on_rank_0(start)
        return no_passes({})

    def sample(self, step: int) -> None:
        """Do nothing: :meth:`validate` has started the whole round."""

    def log(self, line: dict[str, Any]) -> None:
        self._collect()
        self.recorder.log(line)

    def finish(self, *, is_complete: bool) -> None:
        def wait() -> None:
            if self.evaluator is None:
                self._start_missing(self.parts.schedule.total)
            if waiting := self._num_waiting:
                log.info("the training is complete; waiting for %d validation rounds", waiting)
            while self._num_waiting:
                self._collect(wait=True)

        if is_complete:
            self.parts.distributed.on_rank_0(wait)

    def close(self) -> None:
        if self.evaluator is not None:
            self.evaluator.close()

    @property
    def _num_waiting(self) -> int:
        return self.evaluator.waiting if self.evaluator is not None else 0

    def _start_missing(self, last: int) -> None:
        """Start the rounds up to step ``last`` that have a checkpoint and no results."""
        for step in self.checkpointing.checkpoints.steps():
            if step <= last and self.parts.schedule.samples_at(step) and self._is_missing(step):
                self._start(step)

    def _is_missing(self, step: int) -> bool:
        if step in self._started:
            return False
        is_measured, is_drawn = find_round(self.recorder, step)
        validation = self.parts.recipe.validation
        measures = bool(validation.holdout or validation.model_metrics or self.parts.held_out is not None)
        return (measures and not is_measured) or (bool(validation.prompts) and not is_drawn)

    def _start(self, step: int) -> None:
        while self._num_waiting >= MOST_WAITING:
            self._collect(wait=True)
        if self.evaluator is None:
            self.evaluator = self.make_evaluator(self.begins)
        self._started.add(step)
        self.checkpointing.checkpoints.in_use.add(step)
        self.evaluator.start(step)

    def _collect(self, *, wait: bool = False) -> None:
        """Log the rounds that are finished, and keep or release their checkpoints."""
        for found in self.evaluator.finished(wait=wait) if self.evaluator is not None else ():
            figures = dict(found.figures)
            if found.error is not None:
                log.warning("the validation round of step %d failed: %s", found.step, found.error)
            if figures:
                self.recorder.log({"step": found.step, **figures})
            if found.previews is not None:
                self.recorder.write_previews(found.step, found.previews)
                figures |= found.previews.scores
            self.recorder.events.add(
                "evaluation", step=found.step, seconds=found.seconds, remote=True, error=found.error
            )
            self.checkpointing.settle(found.step, figures)


def choose_evaluation(parts: Parts, make_evaluator: MakeEvaluator | None) -> Evaluation | MakeEvaluator:
    """Return ``make_evaluator`` if the recipe gives the rounds resources of their own, else the workers' evaluation."""
    if parts.recipe.validation.resources is None or make_evaluator is None:
        return Evaluation(parts)
    return make_evaluator


def make_rounds(
    source: Evaluation | MakeEvaluator, recorder: Recorder, checkpointing: Checkpointing, *, begins: bool
) -> Rounds:
    """Return the rounds that the workers compute with an evaluation, or that another process computes.

    ``begins``: False if the run continues from a checkpoint.
    """
    if isinstance(source, Evaluation):
        return OwnRounds(source, recorder, checkpointing)
    return RemoteRounds(source, recorder, checkpointing, begins=begins)


def find_round(recorder: Recorder, step: int) -> tuple[bool, bool]:
    """Return whether the round of ``step`` has been measured, and whether its previews exist; rank 0 only."""
    rounds = [line for line in read_metrics(recorder.run) if line["step"] == step and "loss" not in line]
    return bool(rounds), recorder.run.exists(f"samples/step-{step:06d}.png")
