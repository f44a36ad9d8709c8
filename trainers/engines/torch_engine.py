"""The engine: the face every engine has, and the plain one (one device, or DDP)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dreamfleet.datasets.errors import CheckpointError, RecipeError
from dreamfleet.trainers.config.engine import EngineConfig
from dreamfleet.trainers.distributed.device import copy_to_device
from dreamfleet.trainers.distributed.process_group import release_reducer
from dreamfleet.trainers.engines.performance import ask_all, forget_compiled, speed_up
from dreamfleet.trainers.methods.base import Batch, Loss, Method
from dreamfleet.trainers.optim.ema import Ema, saved_average
from dreamfleet.trainers.optim.optimizers import OptimizerConfig, make_optimizer
from dreamfleet.trainers.optim.stochastic_rounding import Stepper, laid_out_like, restore_states

T = TypeVar("T")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine(ABC):
    """What trains a method: one module, one optimizer, on this worker's device.

    Gradients are averaged over workers and micro-steps, so the same global batch gives the same step on any number of
    workers. All but :meth:`place`, :meth:`autocast` and :meth:`drop_gradients` must be called by every worker.
    ``leads`` says whether this is rank 0.
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
        seed: int = 0,
    ):
        self.seed, self.optimizer_name = seed, optimizer.name
        self.method, self.config, self.device, self.world = method, config, device, world
        self.num_micros, self.max_grad_norm = num_micros, optimizer.max_grad_norm
        self.leads = world == 1 or dist.get_rank() == 0
        self.mixed_precision, self.dtype = mixed_precision, DTYPES[mixed_precision]
        speed_up(method.model.unet, config, device)
        self.groups = [group for group in method.groups() if group.params]
        self.params = {name: param for group in self.groups for name, param in group.params.items()}
        self.ema: Ema | None = None
        self.held = ExitStack()  # given back by close(), the last first
        self.held.callback(forget_compiled, config)
        with ExitStack() as undo:
            undo.callback(self.close)
            self._build(optimizer)
            undo.pop_all()

    @abstractmethod
    def _build(self, optimizer: OptimizerConfig) -> None:
        """Make the optimizer and whatever wraps the method."""

    @property
    def lockstep(self) -> bool:
        """Whether each forward pass gathers weights, so that every rank has to make as many, in one order."""
        return self.config.zero_stage == 3

    def place(self, batch: Batch) -> Batch:
        """Move a batch's tensors to the device."""
        return {
            name: copy_to_device(value, self.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def autocast(self) -> Any:
        """Return the context in which forward passes run."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def begin(self, rates: dict[str, float], step: int) -> None:  # noqa: B027 - most engines need not know
        """Tell what step comes next (from 1) and at which rates, before its first :meth:`backward`."""

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
    def evaluate(self, action: Callable[[], T]) -> T:
        """Run ``action`` on every rank where the method computes with its averaged weights (without EMA: its weights).

        Each rank may do its own share, unless the engine is in ``lockstep``: it then has to compute the same on all.
        """

    @abstractmethod
    def whole(self) -> AbstractContextManager[None]:
        """Within this context rank 0's model holds those weights whole, in full precision; it need not compute."""

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

    def close(self) -> None:
        """Give back what the engine holds besides memory; it is not used again."""
        self.held.close()

    def agree(self, flag: bool) -> Callable[[], bool]:
        """Start asking whether any rank raised the flag; call the result for the answer (the same on every rank)."""
        if self.world == 1:
            return lambda: flag
        return ask_all(flag, self.device)

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """Average a tensor of figures over the workers."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values


class TorchEngine(Engine):
    """Runs a method on one device, or on one device per worker with DDP."""

    def _build(self, optimizer: OptimizerConfig) -> None:
        self.narrow = any(param.dtype == torch.bfloat16 for param in self.params.values())
        own = self.method.optimizer()
        if own is not None:
            if optimizer.fused_backward or self.narrow:
                raise RecipeError(
                    f"optimizer.fused_backward and train.full_bf16 do not go with {self.method.name}, whose steps are "
                    "its own; leave them out"
                )
            self.max_grad_norm = 0.0  # clipped, the batches would not count alike
        self.optimizer = own or make_optimizer(self.groups, optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.ema = Ema(self.params, self.config.ema_decay) if self.config.use_ema else None
        self.stepper = Stepper(self.optimizer, seed=self.seed)
        self.coming: int | None = None  # the step that backward may do
        self.squares: list[Tensor] = []  # of the gradients that backward has used up
        self.fused = optimizer.fused_backward
        for param in self.params.values() if self.fused else ():
            # No collector sees from a parameter to its hooks, so they would keep engine and model.
            self.held.callback(param.register_post_accumulate_grad_hook(self._step_inside).remove)
        self.module: Any = self.method
        if self.world > 1:
            self.module = torch.nn.parallel.DistributedDataParallel(
                self.method,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,  # they are the same everywhere, and nothing changes them
            )
            self.held.callback(release_reducer, self.module)

    def begin(self, rates: dict[str, float], step: int) -> None:
        self._set_rates(rates)
        self.coming, self.squares = step, []

    def backward(self, batch: Batch, *, last: bool = True) -> Loss:
        # DDP reduces the gradients in the backward pass before a step.
        sync = nullcontext() if last or self.world == 1 else self.module.no_sync()
        with sync:
            with self.autocast():
                loss = self.module(batch)
            self.scaler.scale(loss.total / self.num_micros).backward()
        return Loss(loss.total.detach(), loss.per_sample.detach(), loss.extras)

    def step(self, rates: dict[str, float], step: int) -> Tensor:
        norm = self._finish_step(step) if self.fused else self._step_together(rates, step)
        if self.ema is not None:
            self.ema.update(self.params, step)
        return norm.detach()

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def evaluate(self, action: Callable[[], T]) -> T:
        with self._lent(lambda param, value: value.to(param.dtype)):
            return action()

    @contextmanager
    def whole(self) -> Iterator[None]:
        with self._lent(lambda _, value: value.contiguous()):  # other programs know one layout
            yield

    def learned(self) -> dict[str, Tensor]:
        return self.method.state()

    def load_learned(self, learned: dict[str, Tensor]) -> None:
        self.method.load_state(learned)

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "optimizer_name": self.optimizer_name,
        }
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        if self.ema is not None:
            state["ema"] = self.ema.shadow
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        check_optimizer(self.optimizer_name, state)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler.is_enabled() and "scaler" in state:
                self.scaler.load_state_dict(state["scaler"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"the saved optimizer does not fit this recipe's: {error}") from error
        restore_states(self.optimizer, state["optimizer"]["state"], keep_types=self.narrow)
        self.stepper = Stepper(self.optimizer, seed=self.seed)  # loading makes new groups
        if self.ema is not None:
            average = saved_average(state)
            self.ema.shadow = {
                name: laid_out_like(self.params[name], t.float()) for name, t in average.items()
            }

    def _set_rates(self, rates: dict[str, float]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]]

    def _step_together(self, rates: dict[str, float], step: int) -> Tensor:
        """Clip, and step every parameter."""
        self._set_rates(rates)
        self.scaler.unscale_(self.optimizer)
        stepped = [param for param in self.params.values() if param.grad is not None]
        norm = torch.nn.utils.get_total_norm([param.grad for param in stepped if param.grad is not None])
        if self.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(stepped, self.max_grad_norm, norm)
        if self.narrow:
            self.stepper.step_all(step)
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.drop_gradients()
        return norm

    def _step_inside(self, param: Tensor) -> None:
        """Step a parameter as soon as backward has its gradient; a rehearsal only drops the gradient."""
        assert isinstance(param, nn.Parameter) and param.grad is not None
        if self.coming is None:
            param.grad = None
            return
        self.squares.append(param.grad.float().square().sum())
        self.stepper.step(param, self.coming)

    def _finish_step(self, step: int) -> Tensor:
        """Return the norm of the gradients that backward stepped with."""
        if self.coming != step:
            raise RuntimeError(f"fused_backward: step {step} was not begun before its backward")
        self.coming = None
        return torch.stack(self.squares).sum().sqrt()

    @contextmanager
    def _lent(self, convert: Callable[[nn.Parameter, Tensor], Tensor]) -> Iterator[None]:
        """Within this context the parameters are the converted ones, averaged where an average is kept."""
        kept = {name: param.data for name, param in self.params.items()}
        lent = kept if self.ema is None else self.ema.shadow
        for name, param in self.params.items():
            param.data = convert(param, lent[name])
        try:
            yield
        finally:
            for name, param in self.params.items():
                param.data = kept[name]


def check_optimizer(name: str, state: dict[str, Any]) -> None:
    """Raise CheckpointError when a saved engine had another optimizer, whose states mean nothing to this one."""
    saved = state.get("optimizer_name", name)
    if saved != name:
        raise CheckpointError(
            f"the checkpoint was saved with optimizer.name: {saved}, and this recipe has {name}; set {saved} to go on"
        )
