"""The training loop, the only one: batch, forward, backward, step, after_step, measure, save, sample, report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from dreamfleet.datasets.errors import RunFailed
from dreamfleet.datasets.keyed import key
from dreamfleet.datasets.section import Section
from dreamfleet.trainers.engine import Engine
from dreamfleet.trainers.methods.base import Batch, Method


class TrainConfig(Section):
    """The ``train:`` section."""

    max_train_steps: int | None = Field(None, ge=1, description="optimizer steps, on any number of workers")
    num_train_epochs: float | None = Field(
        None, gt=0, validation_alias=AliasChoices("num_train_epochs", "max_train_epochs", "epoch")
    )
    train_batch_size: int = Field(
        1, ge=1, validation_alias=AliasChoices("train_batch_size", "batch_size"), description="per worker"
    )
    gradient_accumulation_steps: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)
    # YAML 1.1 reads a bare no as false.
    mixed_precision: Annotated[
        Literal["no", "bf16", "fp16"], BeforeValidator(lambda value: "no" if value is False else value)
    ] = "no"
    full_bf16: bool = Field(
        False,
        description="weights in bfloat16 as well, rounded stochastically after each step: half the memory (needs "
        "mixed_precision: bf16)",
    )
    gradient_checkpointing: bool = False
    snr_gamma: float | None = Field(None, gt=0, validation_alias=AliasChoices("snr_gamma", "min_snr_gamma"))
    noise_offset: float = Field(0.0, ge=0, validation_alias=AliasChoices("noise_offset", "offset_noise"))
    checkpointing_steps: int = Field(
        500, ge=1, validation_alias=AliasChoices("checkpointing_steps", "save_every_n_steps")
    )
    save_every_n_epochs: int | None = Field(
        None, ge=1, description="save at the ends of every so many epochs, in place of checkpointing_steps"
    )
    checkpoints_total_limit: int | None = Field(3, ge=1)
    log_steps: int = Field(10, ge=1)
    save_precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    export_formats: list[str] | None = Field(None, description="None: the method's usual ones")

    @model_validator(mode="after")
    def _check_precision(self) -> TrainConfig:
        if self.full_bf16 and self.mixed_precision != "bf16":
            raise ValueError("full_bf16: true computes in bfloat16; set mixed_precision: bf16 as well")
        return self


@dataclass
class Hooks:
    """What the loop does to the outside world; each is called on every rank and decides itself who acts."""

    log: Callable[[dict[str, Any]], None] = lambda line: None
    save: Callable[[int], None] = lambda step: None
    sample: Callable[[int], None] = lambda step: None
    validate: Callable[[int], dict[str, float]] = lambda step: {}
    should_stop: Callable[[], bool] = lambda: False


@dataclass
class Outcome:
    """How a loop ended."""

    step: int
    exit_reason: Literal["completed", "interrupted"]
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Schedule:
    """How long to train and when to do what, in optimizer steps."""

    total: int
    save_every: int
    sample_every: int
    log_every: int
    save_at: frozenset[int] = frozenset()

    def saves_at(self, done: int) -> bool:
        """Say whether a checkpoint is due after ``done`` steps."""
        return done % self.save_every == 0 or done in self.save_at or done == self.total


def train(
    method: Method,
    engine: Engine,
    batches: Iterator[Batch],
    prepare: Callable[[Batch], Batch],
    *,
    rates: dict[str, Callable[[int], float]],
    schedule: Schedule,
    seed: int,
    start_step: int = 0,
    hooks: Hooks,
) -> Outcome:
    """Train from optimizer step ``start_step`` to ``schedule.total`` or until ``hooks.should_stop``.

    Raises RunFailed when the loss stops being a number.
    """
    meter = _Meter(engine)
    stop_asked = engine.agree(False)
    for step in range(start_step, schedule.total):
        if stop_asked():
            hooks.save(step)
            return Outcome(step, "interrupted", meter.figures)
        stop_asked = engine.agree(hooks.should_stop())
        # Whatever still draws from the global generator (drop-out) repeats exactly after a resume.
        torch.manual_seed(key("step", seed, step))
        now = {name: rate(step) for name, rate in rates.items()}
        for micro in range(engine.num_micros):
            batch = meter.wait_for(batches)
            if step == start_step and micro == 0:
                _rehearse(engine, prepare, batch)
            if micro == 0:
                engine.begin(now, step + 1)
            loss = engine.backward(prepare(engine.place(batch)), last=micro == engine.num_micros - 1)
            meter.add(loss, batch)
        norm = engine.step(now, step + 1)
        method.after_step(step + 1)
        done = step + 1
        if done % schedule.log_every == 0 or done == schedule.total or done == 1:
            hooks.log({"step": done, **meter.read(norm), "lr": now})
        if schedule.saves_at(done):
            hooks.save(done)
        if done % schedule.sample_every == 0 or done == schedule.total:
            if figures := hooks.validate(done):
                meter.figures.update(figures)
                hooks.log({"step": done, **figures})
            hooks.sample(done)
            meter.restart()
    return Outcome(schedule.total, "completed", meter.figures)


def _rehearse(engine: Engine, prepare: Callable[[Batch], Batch], batch: Batch) -> None:
    # Forward and backward once, thrown away: running out of memory shows in the first minute, not at the first save. It
    # also lets DDP settle its buckets, so that the first step after a resume sums gradients in the same order.
    with torch.random.fork_rng():  # a resumed run rehearses where the straight one did not
        engine.backward(prepare(engine.place(batch)))
    engine.drop_gradients()


class _Meter:
    """Adds up losses on the device and reads them only when a line is logged; no host sync in a step."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.figures: dict[str, Any] = {}
        self.total_wait = self.total_time = 0.0
        self.total_images = 0
        self.restart()

    def restart(self) -> None:
        """Start a new interval, forgetting the time since the last line (pictures were drawn, say)."""
        self.start, self.wait, self.images, self.micros = time.perf_counter(), 0.0, 0, 0
        self.sums: dict[str, torch.Tensor] = {}

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        """Take the next batch, counting the time it makes the step wait."""
        before = time.perf_counter()
        batch = next(batches)
        self.wait += time.perf_counter() - before
        return batch

    def add(self, loss: Any, batch: Batch) -> None:
        """Count one micro-batch."""
        for name, value in {"loss": loss.total, **loss.extras}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        self.images += batch["num_instances"] * self.engine.world
        self.micros += 1

    def read(self, norm: torch.Tensor) -> dict[str, Any]:
        """Return the interval's figures, averaged over workers, and start the next interval."""
        names = list(self.sums)
        values = torch.stack([self.sums[name] for name in names]).float() / self.micros
        line: dict[str, Any] = dict(zip(names, self.engine.mean_over_ranks(values).tolist(), strict=True))
        if not math.isfinite(line["loss"]):
            raise RunFailed(
                "the loss is no longer a number; the learning rate is too high, or fp16 overflowed: lower "
                "optimizer.learning_rate, use bf16, or clip with optimizer.max_grad_norm, then continue from the last "
                "checkpoint with --resume"
            )
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
    """Return the most bytes allocated on a GPU so far, or the process's peak resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
