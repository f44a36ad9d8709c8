"""Sums and checks the losses of training steps on the device, and turns them into lines of metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dreamfleet.datasets.errors import RunFailed
from dreamfleet.trainers.engines.base import Engine
from dreamfleet.trainers.methods.base import Batch, Loss

# Steps with a zero gradient that chance does not explain, such as the chance that all captions are dropped.
STEPS_WITHOUT_GRADIENT = 20


class LossWatch:
    """Tracks on the device, without host sync, whether losses are finite and whether any gradient is not zero."""

    def __init__(self, engine: Engine, total: int, start_step: int, saved: Callable[[], int | None]):
        self.engine, self.total, self.start_step, self.saved = engine, total, start_step, saved
        self.not_finite = torch.zeros((), device=engine.device)
        self.moved: torch.Tensor | None = None

    def see_loss(self, loss: torch.Tensor) -> None:
        """Track the loss of one unit."""
        self.not_finite = torch.maximum(self.not_finite, (~loss.detach().isfinite()).float())

    def see_norm(self, norm: torch.Tensor) -> None:
        """Track the gradient norm of a step. A step that fp16 skips has a norm that is not zero."""
        self.moved = norm != 0 if self.moved is None else self.moved | (norm != 0)

    def require_finite(self, done: int) -> None:
        """Raise RunFailed on every rank if a loss of any rank was not finite; every rank calls this."""
        if float(self.engine.sum_over_ranks(self.not_finite.clone())) > 0:
            raise RunFailed(diverged(f"the loss is no longer a number at step {done}", self.saved()))

    def require_gradient(self, done: int) -> None:
        """Raise RunFailed if the gradient was exactly zero at every step so far, after STEPS_WITHOUT_GRADIENT steps."""
        steps = done - self.start_step
        whole_run = done == self.total and self.start_step == 0
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


class Meter:
    """Sums losses on the device and reads them when a line is logged, so that steps have no host sync."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.figures: dict[str, Any] = {}
        self.total_wait = self.total_time = 0.0
        self.total_images = 0
        self.restart()

    def restart(self) -> None:
        """Start a new interval."""
        self.start, self.wait, self.images, self.steps, self.units = time.perf_counter(), 0.0, 0, 0, 0
        self.sums: dict[str, torch.Tensor] = {}
        self.has_times = True  # False for an interval with a step that a profiler slowed down

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

    def add(self, losses: Sequence[Loss], *, images: int) -> None:
        """Add one step to the interval: the losses of this worker's units, and the images of all workers."""
        for loss in losses:
            for name, value in {"loss": loss.total, **loss.extras}.items():
                self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        self.images, self.steps, self.units = self.images + images, self.steps + 1, self.units + len(losses)

    def read(self, norm: torch.Tensor, *, alone: bool = False) -> dict[str, Any]:
        """Return the interval's metrics, losses averaged over all units, and start the next interval.

        ``alone``: over the units of this rank, without the others.
        """
        names = list(self.sums)
        sums = torch.stack([self.sums[name].float() for name in names])
        summed = torch.cat([sums, sums.new_tensor([self.units])])
        if not alone:
            summed = self.engine.sum_over_ranks(summed)
        line: dict[str, Any] = dict(zip(names, (summed[:-1] / summed[-1]).tolist(), strict=True))
        line |= {"grad_norm": float(norm), "peak_memory_bytes": peak_memory(self.engine.device)}
        if self.has_times:
            line |= self._read_times()
        self.figures |= {"loss": line["loss"], "peak_memory_bytes": line["peak_memory_bytes"]}
        self.restart()
        return line

    def _read_times(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self.start
        self.total_time, self.total_wait = self.total_time + elapsed, self.total_wait + self.wait
        self.total_images += self.images
        self.figures |= {
            "images_per_second": self.total_images / self.total_time,
            "data_wait_fraction": self.total_wait / self.total_time,
        }
        return {
            "images_per_second": self.images / elapsed,
            "step_seconds": elapsed / self.steps,
            "data_wait_fraction": min(1.0, self.wait / elapsed),
        }


def peak_memory(device: torch.device) -> int:
    """Return the peak of allocated bytes on a GPU, or of the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
