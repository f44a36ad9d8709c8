"""The training loop: batch, forward, backward, optimizer step, metrics, checkpoint, held-out loss, previews."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from dreamfleet.datasets.errors import RunFailed
from dreamfleet.datasets.rng import key
from dreamfleet.trainers.engines.base import Engine
from dreamfleet.trainers.methods.base import Batch, Loss

# Steps with a zero gradient that chance does not explain, such as the chance that all captions are dropped.
STEPS_WITHOUT_GRADIENT = 20


@dataclass
class Hooks:
    """Functions that the loop calls, on every rank."""

    log: Callable[[dict[str, Any]], None] = lambda line: None
    save: Callable[[int], None] = lambda step: None
    sample: Callable[[int], None] = lambda step: None
    validate: Callable[[int], dict[str, float]] = lambda step: {}
    should_stop: Callable[[], bool] = lambda: False
    #: the step of the newest checkpoint, the same on every rank; None when there is none
    saved: Callable[[], int | None] = lambda: None


@dataclass
class Outcome:
    """The result of a loop: optimizer steps done, the reason for its end, and the last figures."""

    step: int
    exit_reason: Literal["completed", "interrupted"]
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


class Micro(NamedTuple):
    """One prepared micro-batch, for which the loop needs a forward and backward pass of ``engine``.

    ``last``: it is the last one of its step. ``seed``: the seed of the random numbers that the pass draws from torch's
    generator, as dropout does; None: it continues the sequence of the pass before. ``keeps``: gradients of earlier
    micro-batches of the step are stored in the parameters.
    """

    engine: Engine
    batch: Batch
    last: bool
    seed: int | None
    keeps: bool = False


Result = TypeVar("Result")
#: A training that yields micro-batches and is sent the loss of each: several can share one forward and backward pass.
Training = Generator[Micro, Loss, Result]


def drive(training: Training[Result]) -> Result:
    """Run a training alone: compute the passes that it asks for, one after the other; return its result."""
    try:
        micro = next(training)
        while True:
            if micro.seed is not None:
                torch.manual_seed(micro.seed)
            micro = training.send(micro.engine.backward(micro.batch, last=micro.last))
    except StopIteration as end:
        return end.value
    finally:
        training.close()


def train(
    engine: Engine,
    batches: Iterator[Batch],
    prepare: Callable[[Batch], Batch],
    *,
    rates: dict[str, Callable[[int], float]],
    schedule: Schedule,
    seed: int,
    rank: int = 0,
    start_step: int = 0,
    hooks: Hooks,
) -> Training[Outcome]:
    """Train from optimizer step ``start_step`` to ``schedule.total`` or until ``hooks.should_stop``.

    This is a generator: see :func:`drive`. ``prepare`` completes a batch on the device. ``rates``: the learning rate of
    each parameter group as a function of the step (from 0). Raises RunFailed if a loss is not finite, before the
    resulting weights are saved or evaluated, and if every gradient is exactly zero.
    """
    loop = _Loop(engine, batches, prepare, rates, schedule, hooks, start_step)
    step = start_step
    try:
        stop_asked = engine.any_rank(False)
        for step in range(start_step, schedule.total):
            if stop_asked():
                return loop.interrupt(step)
            stop_asked = engine.any_rank(hooks.should_stop())
            # Code that draws from the global generator (dropout) repeats exactly after a resume, and differs by rank.
            yield from loop.take_step(step, key("step", seed, step, rank))
    except StopTraining:
        engine.drop_gradients()
        return loop.interrupt(step)
    return Outcome(schedule.total, "completed", loop.meter.figures)


class StopTraining(Exception):
    """Thrown into a training that waits for a pass: it drops the unfinished step, saves a checkpoint and ends."""


class _Loop:
    """The state of one training between its steps."""

    def __init__(
        self,
        engine: Engine,
        batches: Iterator[Batch],
        prepare: Callable[[Batch], Batch],
        rates: dict[str, Callable[[int], float]],
        schedule: Schedule,
        hooks: Hooks,
        start_step: int,
    ):
        self.engine, self.batches, self.prepare, self.rates = engine, batches, prepare, rates
        self.schedule, self.hooks, self.start_step = schedule, hooks, start_step
        self.watch = _Watch(engine, schedule, start_step, hooks.saved)
        self.meter = _Meter(engine)

    def take_step(self, step: int, seed: int) -> Generator[Micro, Loss, None]:
        """Take optimizer step ``step`` (from 0); then log, save, evaluate and generate previews where they are due."""
        engine, meter = self.engine, self.meter
        now = {name: rate(step) for name, rate in self.rates.items()}
        for number in range(engine.num_micros):
            batch = meter.wait_for(self.batches)
            if step == self.start_step and number == 0:
                # One forward and backward pass whose result is dropped, so that insufficient memory is reported in the
                # first minute. DDP also fixes its buckets: the first step after a resume sums gradients in equal order.
                yield Micro(engine, self.prepare(engine.to_device(batch)), last=True, seed=seed)
                engine.drop_gradients()
            if number == 0:
                engine.begin_step(now, step + 1)
            last, micro_seed = number == engine.num_micros - 1, None if number else seed
            ready = self.prepare(engine.to_device(batch))
            loss = yield Micro(engine, ready, last=last, seed=micro_seed, keeps=number > 0)
            self.watch.see_loss(loss.total)
            meter.add(loss, batch)
        norm = engine.step(now, step + 1)
        self.watch.see_norm(norm)
        self._finish_step(step + 1, norm, now)

    def interrupt(self, done: int) -> Outcome:
        """Save a checkpoint after ``done`` steps, and return the outcome of the interrupted training."""
        self.watch.require_finite(done)
        self.hooks.save(done)
        return Outcome(done, "interrupted", self.meter.figures)

    def _finish_step(self, done: int, norm: torch.Tensor, rates: dict[str, float]) -> None:
        schedule, hooks = self.schedule, self.hooks
        logs, saves, samples = schedule.logs_at(done), schedule.saves_at(done), schedule.samples_at(done)
        if logs or saves or samples:
            self.watch.require_finite(done)
        if logs:
            self.watch.require_gradient(done)
            hooks.log({"step": done, **self.meter.read(norm), "lr": rates})
        with self.meter.paused():
            if saves:
                hooks.save(done)
            if samples:
                if figures := hooks.validate(done):
                    self.meter.figures.update(figures)
                    hooks.log({"step": done, **figures})
                hooks.sample(done)


class _Watch:
    """Tracks on the device, without host sync, whether losses are finite and whether any gradient is not zero."""

    def __init__(self, engine: Engine, schedule: Schedule, start_step: int, saved: Callable[[], int | None]):
        self.engine, self.schedule, self.start_step, self.saved = engine, schedule, start_step, saved
        self.not_finite = torch.zeros((), device=engine.device)
        self.moved: torch.Tensor | None = None

    def see_loss(self, loss: torch.Tensor) -> None:
        """Track the loss of one micro-step."""
        self.not_finite = torch.maximum(self.not_finite, (~loss.detach().isfinite()).float())

    def see_norm(self, norm: torch.Tensor) -> None:
        """Track the gradient norm of a step. A step that fp16 skips has a norm that is not zero."""
        self.moved = norm != 0 if self.moved is None else self.moved | (norm != 0)

    def require_finite(self, done: int) -> None:
        """Raise RunFailed on every rank if a loss of any rank was not finite; every rank calls this."""
        if float(self.engine.mean_over_ranks(self.not_finite.clone())) > 0:
            raise RunFailed(diverged(f"the loss is no longer a number at step {done}", self.saved()))

    def require_gradient(self, done: int) -> None:
        """Raise RunFailed if the gradient was exactly zero at every step so far, after STEPS_WITHOUT_GRADIENT steps."""
        steps = done - self.start_step
        whole_run = done == self.schedule.total and self.start_step == 0
        if self.moved is None or (steps < STEPS_WITHOUT_GRADIENT and not whole_run) or bool(self.moved):
            return
        raise RunFailed(
            f"the model is not training: the gradient was exactly zero at each of {steps} steps, so the loss does "
            "not depend "
            "on the trainable parameters. Check whether the prompts contain the placeholder token, whether all "
            "captions are dropped (data.caption_dropout), whether masks exclude whole images, and, with "
            "fp16, whether gradients underflow (use bf16)"
        )


def diverged(what: str, saved: int | None) -> str:
    """Return the message of a diverged run: what is not finite, the remedy, and the checkpoint to continue from."""
    good = (
        f"Everything up to the checkpoint of step {saved} is finite: continue from it with --resume (or delete it "
        "to continue from the one before)"
        if saved
        else "No checkpoint was saved before: start again in another output_dir"
    )
    return (
        f"{what}; the learning rate is too high, or fp16 overflowed: lower optimizer.learning_rate, use bf16, or clip "
        f"with optimizer.max_grad_norm. {good}"
    )


class _Meter:
    """Sums losses on the device and reads them when a line is logged, so that steps have no host sync."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.figures: dict[str, Any] = {}
        self.total_wait = self.total_time = 0.0
        self.total_images = 0
        self.restart()

    def restart(self) -> None:
        """Start a new interval."""
        self.start, self.wait, self.images, self.micros = time.perf_counter(), 0.0, 0, 0
        self.sums: dict[str, torch.Tensor] = {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time within this context (a checkpoint, previews) from the interval."""
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        """Return the next batch, and count the time that the step waits for it."""
        before = time.perf_counter()
        batch = next(batches)
        self.wait += time.perf_counter() - before
        return batch

    def add(self, loss: Any, batch: Batch) -> None:
        """Add one micro-batch to the interval."""
        for name, value in {"loss": loss.total, **loss.extras}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        self.images += batch["num_instances"] * self.engine.world
        self.micros += 1

    def read(self, norm: torch.Tensor) -> dict[str, Any]:
        """Return the interval's metrics, averaged over workers, and start the next interval."""
        names = list(self.sums)
        values = torch.stack([self.sums[name] for name in names]).float() / self.micros
        line: dict[str, Any] = dict(zip(names, self.engine.mean_over_ranks(values).tolist(), strict=True))
        elapsed = time.perf_counter() - self.start
        self.total_time, self.total_wait = self.total_time + elapsed, self.total_wait + self.wait
        self.total_images += self.images
        line |= {
            "grad_norm": float(norm),
            "images_per_second": self.images / elapsed,
            "step_seconds": elapsed / (self.micros / self.engine.num_micros),
            "data_wait_fraction": min(1.0, self.wait / elapsed),
            "peak_memory_bytes": peak_memory(self.engine.device),
        }
        self.figures = {
            **self.figures,
            "loss": line["loss"],
            "images_per_second": self.total_images / self.total_time,
            "data_wait_fraction": self.total_wait / self.total_time,
            "peak_memory_bytes": line["peak_memory_bytes"],
        }
        self.restart()
        return line


def peak_memory(device: torch.device) -> int:
    """Return the peak of allocated bytes on a GPU, or of the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
