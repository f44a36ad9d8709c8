"""The engine: its recipe section, the face every engine has, and the plain one (one device, or DDP)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor

from dreamfleet.datasets.errors import CheckpointError, ResourceError
from dreamfleet.datasets.section import Section
from dreamfleet.trainers.methods.base import Batch, Loss, Method
from dreamfleet.trainers.optim import OptimizerConfig, make_optimizer

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class EngineConfig(Section):
    """The ``engine:`` section."""

    zero_stage: Literal["auto", 0, 1, 2, 3] = Field(
        "auto",
        description="auto: torch alone. 0 to 3: DeepSpeed, which shards nothing (0), optimizer states (1), gradients "
        "too (2), weights too (3) over the workers",
    )
    offload_optimizer_device: Literal["none", "cpu"] = Field(
        "none", description="cpu: optimizer states and step in host memory (zero_stage 1 to 3)"
    )
    offload_param_device: Literal["none", "cpu"] = Field(
        "none", description="cpu: weights in host memory until a layer needs them (zero_stage 3)"
    )
    allow_tf32: bool = Field(True, description="TF32 matrix products on NVIDIA cards")
    use_ema: bool = Field(False, description="keep an average of the weights, and sample and export that")
    ema_decay: float = Field(0.9999, gt=0, lt=1)

    @model_validator(mode="after")
    def _check_offload(self) -> EngineConfig:
        if self.offload_param_device != "none" and self.zero_stage != 3:
            raise ValueError(
                f"offload_param_device: {self.offload_param_device} needs zero_stage: 3, which shards the weights; "
                "set it, or offload_param_device: none"
            )
        if self.offload_optimizer_device != "none" and self.zero_stage in ("auto", 0):
            raise ValueError(
                f"offload_optimizer_device: {self.offload_optimizer_device} needs zero_stage: 1, 2 or 3, which shard "
                "the optimizer; set one (2 suits most models), or offload_optimizer_device: none"
            )
        return self


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


class Engine(ABC):
    """What trains a method: one module, one optimizer, on this worker's device.

    Gradients are averaged over workers and micro-steps, so the same global batch gives the same step on any number of
    workers. All but :meth:`place`, :meth:`autocast` and :meth:`drop_gradients` must be called by every worker.
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
        self.ema: Ema | None = None
        self._build(optimizer)

    @abstractmethod
    def _build(self, optimizer: OptimizerConfig) -> None:
        """Make the optimizer and whatever wraps the method."""

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

    @abstractmethod
    def backward(self, batch: Batch, *, last: bool = True) -> Loss:
        """Forward and backward of one micro-batch; ``last`` says that the optimizer steps next."""

    @abstractmethod
    def step(self, rates: dict[str, float], step: int) -> Tensor:
        """Clip, step the optimizer with one learning rate per group, update the average; returns the gradient norm."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Forget every gradient since the last step."""

    @abstractmethod
    def averaged(self) -> AbstractContextManager[None]:
        """Within this context rank 0's method computes with its whole, averaged weights (without EMA: its weights)."""

    @abstractmethod
    def whole(self) -> AbstractContextManager[None]:
        """Within this context rank 0's method holds the same in full precision, for export; it need not compute."""

    @abstractmethod
    def learned(self) -> dict[str, Tensor]:
        """Return the learned weights by name, whole and in full precision, on rank 0."""

    @abstractmethod
    def load_learned(self, learned: dict[str, Tensor]) -> None:
        """Put back what :meth:`learned` gave. Raises RecipeError when names or shapes differ."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what a resume needs besides the learned weights, on rank 0; every engine reads every engine's."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state` gave. Raises CheckpointError when it does not fit this run."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the engine holds besides memory; it is not used again."""

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


class TorchEngine(Engine):
    """Runs a method on one device, or on one device per worker with DDP."""

    def _build(self, optimizer: OptimizerConfig) -> None:
        own = self.method.optimizer()
        if own is not None:
            self.max_grad_norm = 0.0  # clipped, the batches would not count alike
        self.optimizer = own or make_optimizer(self.groups, optimizer, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.ema = Ema(self.params, self.config.ema_decay) if self.config.use_ema else None
        self.module: Any = self.method
        if self.world > 1:
            self.module = torch.nn.parallel.DistributedDataParallel(
                self.method,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )

    def backward(self, batch: Batch, *, last: bool = True) -> Loss:
        # DDP reduces the gradients in the backward pass before a step.
        sync = nullcontext() if last or self.world == 1 else self.module.no_sync()
        with sync:
            with self.autocast():
                loss = self.module(batch)
            self.scaler.scale(loss.total / self.num_micros).backward()
        return Loss(loss.total.detach(), loss.per_sample.detach(), loss.extras)

    def step(self, rates: dict[str, float], step: int) -> Tensor:
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
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        if self.ema is None:
            yield
            return
        live = {name: param.detach().clone() for name, param in self.params.items()}
        self._assign(self.ema.shadow)
        try:
            yield
        finally:
            self._assign(live)

    def whole(self) -> AbstractContextManager[None]:
        return self.averaged()

    def learned(self) -> dict[str, Tensor]:
        return self.method.state()

    def load_learned(self, learned: dict[str, Tensor]) -> None:
        self.method.load_state(learned)

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        if self.ema is not None:
            state["ema"] = self.ema.shadow
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler.is_enabled() and "scaler" in state:
                self.scaler.load_state_dict(state["scaler"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"the saved optimizer does not fit this recipe's: {error}") from error
        if self.ema is not None:
            average = saved_average(state)
            self.ema.shadow = {n: t.to(self.params[n].device, torch.float32) for n, t in average.items()}

    def close(self) -> None:
        pass  # whoever made the process group ends it

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, param in self.params.items():
            param.copy_(values[name])


def saved_average(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the averaged weights of a saved engine. Raises CheckpointError when it kept none."""
    if "ema" not in state:
        raise CheckpointError("engine.use_ema is on, but the checkpoint was saved without an average")
    return state["ema"]
