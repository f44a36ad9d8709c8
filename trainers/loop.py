"""The training loop: batch, forward, backward, optimizer step, metrics, checkpoint, held-out loss, previews."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from dreamfleet.datasets.rng import key
from dreamfleet.trainers.distributed.pulse import Pulse
from dreamfleet.trainers.engines.base import Engine
from dreamfleet.trainers.engines.model_passes import Micro
from dreamfleet.trainers.engines.passes import Passes, no_passes
from dreamfleet.trainers.methods.base import Batch
from dreamfleet.trainers.step_metrics import LossWatch, Meter


@dataclass
class Hooks:
    """Functions that the loop calls, on every rank."""

    log: Callable[[dict[str, Any]], None] = lambda line: None
    save: Callable[[int], None] = lambda step: None
    sample: Callable[[int], None] = lambda step: None
    #: measures the model after a step
    validate: Callable[[int], Passes[dict[str, float]]] = lambda step: no_passes({})
    should_stop: Callable[[], bool] = lambda: False
    #: whether a worker waits to join or to leave; if any rank says so, all end the loop after the same step
    should_regroup: Callable[[], bool] = lambda: False
    #: whether to save a checkpoint before regrouping, because a worker is to leave
    should_save: Callable[[], bool] = lambda: False
    #: the step of the newest checkpoint, the same on every rank; None when there is none
    saved: Callable[[], int | None] = lambda: None
    #: whether a step (from 1) is profiled, so that its time does not count
    is_profiled: Callable[[int], bool] = lambda step: False
    #: the progress that other threads read
    pulse: Pulse = field(default_factory=Pulse)


@dataclass
class Outcome:
    """The result of a loop: optimizer steps done, the reason for its end, and the last figures."""

    step: int
    exit_reason: Literal["completed", "interrupted", "regroup"]
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Schedule:
    """The number of optimizer steps, and those after which to save, generate previews and log."""

    total: int
    save_every: int
    sample_every: int
    log_every: int
    save_at: frozenset[int] = frozenset()

    def saves_at(self, done: int) -> bool:
        """Return whether a checkpoint is due after ``done`` steps."""
        return done % self.save_every == 0 or done in self.save_at or done == self.total

    def logs_at(self, done: int) -> bool:
        """Return whether a line of metrics is due after ``done`` steps."""
        return done % self.log_every == 0 or done == self.total or done == 1

    def samples_at(self, done: int) -> bool:
        """Return whether held-out images are evaluated and previews generated after ``done`` steps."""
        return done % self.sample_every == 0 or done == self.total


def train(
    engine: Engine,
    batches: Iterator[Batch],
    prepare: Callable[[Batch], Batch],
    *,
    rates: dict[str, Callable[[int], float]],
    schedule: Schedule,
    seed: int,
    start_step: int = 0,
    hooks: Hooks,
    progress: Progress | None = None,
) -> Passes[Outcome]:
    """Train from optimizer step ``start_step`` to ``schedule.total``, or until the hooks ask to stop or to regroup.

    ``drive`` of :mod:`~dreamfleet.trainers.engines.passes` runs it alone. ``prepare`` completes a batch on the device.
    ``rates``: the learning rate of each parameter group as a function of the step (from 0). ``progress``: that of a
    training whose workers have changed. Raises RunFailed if a loss is not finite, before the resulting weights are
    saved or evaluated, and if every gradient is exactly zero.
    """
    progress = progress or Progress(engine, schedule, start_step, hooks)
    loop = _Loop(engine, batches, prepare, rates, progress, hooks)
    step = start_step
    try:
        asked = engine.any_rank(False, False, False)
        for step in range(start_step, schedule.total):
            stops, regroups, saves = asked()
            if stops:
                return loop.interrupt(step)
            if regroups:
                if saves:
                    loop.interrupt(step)
                return Outcome(step, "regroup", progress.meter.figures)
            asked = engine.any_rank(hooks.should_stop(), hooks.should_regroup(), hooks.should_save())
            yield from loop.take_step(step, seed)
    except StopTraining:
        engine.drop_gradients()
        return loop.interrupt(progress.done or step)  # thrown into a measurement, the step is done
    finally:
        hooks.pulse.end()
    return Outcome(schedule.total, "completed", progress.meter.figures)


class StopTraining(Exception):
    """Thrown into a training that waits for a pass: it drops the unfinished step, saves a checkpoint and ends."""


class Progress:
    """How far a training is on this rank: it outlives the process groups of a training whose workers change.

    ``done``: the finished optimizer steps of the engine's state; None while a new state is being received.
    """

    def __init__(self, engine: Engine, schedule: Schedule, start_step: int, hooks: Hooks):
        self.engine, self.schedule = engine, schedule
        self.done: int | None = start_step
        self.watch = LossWatch(engine, schedule.total, start_step, hooks.saved)
        self.meter = Meter(engine)
        self.is_warm = False
        self._unlogged: tuple[int, torch.Tensor, dict[str, float]] | None = None

    def warm_up(self, batch: Batch, prepare: Callable[[Batch], Batch], *, seed: int) -> Passes[None]:
        """Run one forward and backward pass whose result is dropped, so that insufficient memory shows early."""
        yield Micro(self.engine, prepare(self.engine.to_device(batch)), last=True, seed=seed)
        self.engine.drop_gradients()
        self.is_warm = True

    def log(self, done: int, norm: torch.Tensor, rates: dict[str, float], hooks: Hooks) -> None:
        """Log the line of metrics that is due after ``done`` steps."""
        self._unlogged = (done, norm, rates)
        self.watch.require_finite(done)
        self.watch.require_gradient(done)
        hooks.log({"step": done, **self.meter.read(norm), **self._describe(rates)})
        self._unlogged = None

    def line_alone(self) -> dict[str, Any] | None:
        """Return the line that :meth:`log` did not complete, from this rank's losses; None if there is none."""
        unlogged, self._unlogged = self._unlogged, None
        if unlogged is None or unlogged[0] != self.done:
            return None
        return {
            "step": unlogged[0],
            **self.meter.read(unlogged[1], alone=True),
            **self._describe(unlogged[2]),
        }

    def _describe(self, rates: dict[str, float]) -> dict[str, dict[str, float]]:
        """Return the entries of a line of metrics for the learning rates of the last step."""
        effective = self.engine.effective_rates()
        return {"lr": rates, "effective_lr": effective} if effective else {"lr": rates}


class _Loop:
    """The steps of one training with one process group."""

    def __init__(
        self,
        engine: Engine,
        batches: Iterator[Batch],
        prepare: Callable[[Batch], Batch],
        rates: dict[str, Callable[[int], float]],
        progress: Progress,
        hooks: Hooks,
    ):
        self.engine, self.batches, self.prepare, self.rates = engine, batches, prepare, rates
        self.progress, self.schedule, self.hooks = progress, progress.schedule, hooks
        self.watch, self.meter = progress.watch, progress.meter
        hooks.pulse.resume(progress.done or 0)

    def take_step(self, step: int, seed: int) -> Passes[None]:
        """Take optimizer step ``step`` (from 0); then log, save, evaluate and generate previews where they are due.

        ``seed``: the run's seed. Each unit has its own seed for code that draws from torch's generator (dropout), so
        that it repeats exactly after a resume and on any number of workers.
        """
        engine, meter, units = self.engine, self.meter, self.engine.units
        pulse = self.hooks.pulse
        now = {name: rate(step) for name, rate in self.rates.items()}
        losses = []
        for number, unit in enumerate(units):
            pulse.mark("data")
            batch, unit_seed = meter.wait_for(self.batches), key("step", seed, step, unit)
            if not self.progress.is_warm:
                yield from self.progress.warm_up(batch, self.prepare, seed=unit_seed)
            if number == 0:
                engine.begin_step(now, step + 1)
            ready = self.prepare(engine.to_device(batch))
            last = number == len(units) - 1
            pulse.begin_pass(ready, last=last)
            loss = yield Micro(engine, ready, last=last, seed=unit_seed, keeps=number > 0)
            self.watch.see_loss(loss.total)
            losses.append(loss)
        pulse.mark("reduce")
        norm = engine.step(now, step + 1)
        self.progress.done = step + 1
        self.watch.see_norm(norm)
        meter.has_times &= not self.hooks.is_profiled(step + 1)
        meter.add(losses, images=batch["num_instances"] * engine.num_units)
        yield from self._finish_step(step + 1, norm, now)

    def interrupt(self, done: int) -> Outcome:
        """Save a checkpoint after ``done`` steps, and return the outcome of the interrupted training."""
        self.watch.require_finite(done)
        with self.hooks.pulse.during("save"):
            self.hooks.save(done)
        return Outcome(done, "interrupted", self.meter.figures)

    def _finish_step(self, done: int, norm: torch.Tensor, rates: dict[str, float]) -> Passes[None]:
        schedule, hooks = self.schedule, self.hooks
        logs, saves, samples = schedule.logs_at(done), schedule.saves_at(done), schedule.samples_at(done)
        if logs:
            self.progress.log(done, norm, rates, hooks)
        elif saves or samples:
            self.watch.require_finite(done)
        hooks.pulse.saved = hooks.saved()
        hooks.pulse.finish_step(done)
        with self.meter.paused():
            if saves:
                with hooks.pulse.during("save"):
                    hooks.save(done)
            if samples:
                with hooks.pulse.during("evaluation"):
                    if figures := (yield from hooks.validate(done)):
                        self.meter.figures.update(figures)
                        hooks.log({"step": done, **figures})
                    hooks.sample(done)
