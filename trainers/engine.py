"""The engine: backward, step and averages on one device or under DDP, and the state to resume from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from dreamfleet.datasets.errors import CheckpointError, ResourceError
from dreamfleet.datasets.section import Section
from dreamfleet.trainers.methods.base import Batch, Loss, Method
from dreamfleet.trainers.optim import OptimizerConfig, make_optimizer

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class EngineConfig(Section):
    """The ``engine:`` section."""

    name: Literal["torch"] = "torch"
    allow_tf32: bool = Field(True, description="TF32 matrix products on NVIDIA cards")
    use_ema: bool = Field(False, description="keep an average of the weights, and sample and export that")
    ema_decay: float = Field(0.9999, gt=0, lt=1)


class Ema:
    """A moving average of the learning weights in float32, warmed up as diffusers' EMAModel does."""

    def __init__(self, params: Mapping[str, Tensor], decay: float):
        self.decay = decay
        self.shadow = {name: param.detach().float().clone() for name, param in params.items()}

    @torch.no_grad()
    def update(self, params: Mapping[str, Tensor], step: int) -> None:
        """Move the average towards the weights after optimizer step ``step`` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.shadow.values()), [p.detach().float() for p in params.values()], 1.0 - decay
        )


class TorchEngine:
    """Runs a method on one device, or on one device per worker with DDP.

    Gradients are averaged over workers and micro-steps, so the same global batch gives the same step on any number of
    workers.
    """

    def __init__(
        self,
        method: Method,
        *,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        mixed_precision: str,
        device: torch.device,
        world: int = 1,
        num_micros: int = 1,
    ):
        self.method, self.config, self.device, self.world = method, config, device, world
        self.num_micros, self.max_grad_norm = num_micros, optimizer.max_grad_norm
        self.dtype = DTYPES[mixed_precision]
        if self.dtype == torch.float16 and device.type != "cuda":
            raise ResourceError("train.mixed_precision: fp16 needs a GPU; use bf16 or no on this machine")
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
            torch.backends.cudnn.allow_tf32 = config.allow_tf32
        self.groups = [group for group in method.groups() if group.params]
        self.params = {name: param for group in self.groups for name, param in group.params.items()}
        self.optimizer = make_optimizer(self.groups, optimizer, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.ema = Ema(self.params, config.ema_decay) if config.use_ema else None
        self.module: Any = method
        if world > 1:
            self.module = torch.nn.parallel.DistributedDataParallel(
                method, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )

    def place(self, batch: Batch) -> Batch:
        """Move a batch's tensors to the device."""
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def autocast(self) -> Any:
        """Return the context in which forward passes run."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def backward(self, batch: Batch, *, last: bool = True) -> Loss:
        """Forward and backward of one micro-batch; ``last`` says that the optimizer steps next (DDP then reduces)."""
        sync = nullcontext() if last or self.world == 1 else self.module.no_sync()
        with sync:
            with self.autocast():
                loss = self.module(batch)
            self.scaler.scale(loss.total / self.num_micros).backward()
        return Loss(loss.total.detach(), loss.per_sample.detach(), loss.extras)

    def step(self, rates: dict[str, float], step: int) -> Tensor:
        """Clip, step the optimizer with one learning rate per group, update the average; returns the gradient norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        self.scaler.unscale_(self.optimizer)
        limit = self.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(list(self.params.values()), limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.drop_gradients()
        if self.ema is not None:
            self.ema.update(self.params, step)
        return norm.detach()

    def drop_gradients(self) -> None:
        """Free the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the method holds the averaged weights; without EMA it changes nothing."""
        if self.ema is None:
            yield
            return
        live = {name: param.detach().clone() for name, param in self.params.items()}
        self._assign(self.ema.shadow)
        try:
            yield
        finally:
            self._assign(live)

    def agree(self, flag: bool) -> Callable[[], bool]:
        """Start asking whether any rank raised the flag; call the result for the answer (the same on every rank)."""
        if self.world == 1:
            return lambda: flag
        tensor = torch.tensor(int(flag), device=self.device)
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(tensor.item())

        return answer

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """Average a tensor of figures over the workers."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def state(self) -> dict[str, Any]:
        """Return what a resume needs besides the learned weights; the same on every rank."""
        state: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        if self.ema is not None:
            state["ema"] = self.ema.shadow
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state` gave. Raises CheckpointError when it does not fit this run."""
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler.is_enabled() and "scaler" in state:
                self.scaler.load_state_dict(state["scaler"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"the saved optimizer does not fit this recipe's: {error}") from error
        if self.ema is not None:
            if "ema" not in state:
                raise CheckpointError("engine.use_ema is on, but the checkpoint was saved without an average")
            self.ema.shadow = {n: t.to(self.params[n].device, torch.float32) for n, t in state["ema"].items()}

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, param in self.params.items():
            param.copy_(values[name])
