"""The engine that uses only torch: on a single device, or data-parallel on several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dreamfleet.datasets.errors import CheckpointError, RecipeError
from dreamfleet.trainers.config.engines import TorchSpec
from dreamfleet.trainers.config.optimizer import OptimizerConfig
from dreamfleet.trainers.engines.base import Engine, T, check_optimizer
from dreamfleet.trainers.engines.gradient_exchange import GradientExchange
from dreamfleet.trainers.engines.passes import Passes
from dreamfleet.trainers.methods.base import Batch, Loss
from dreamfleet.trainers.optim.ema import Ema, saved_average
from dreamfleet.trainers.optim.optimizers import make_optimizer, resolve
from dreamfleet.trainers.optim.stochastic_rounding import Stepper, copy_in_layout, restore_states


class TorchEngine(TorchSpec, Engine):
    """Trains a method on one device, or on one device per worker, each of which holds all weights and states."""

    def _build(self, optimizer: OptimizerConfig) -> None:
        self.bf16_weights = any(param.dtype == torch.bfloat16 for param in self.params.values())
        own = self.method.optimizer()
        if own is not None:
            if optimizer.fused_backward or self.bf16_weights:
                raise RecipeError(
                    f"optimizer.fused_backward and train.full_bf16 do not go with {self.method.name}, which has an "
                    "optimizer of its own; leave them out"
                )
            self.max_grad_norm = 0.0  # no clipping, which would give the batches different weights
        self.optimizer = own or make_optimizer(self.groups, optimizer)
        kind = optimizer.kind if own is None else None
        self.steps_alone = kind is None or kind.steps_alone
        self._average = resolve(kind.average) if kind and kind.average else None
        self._effective_rate = resolve(kind.effective_rate) if kind and kind.effective_rate else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.ema = Ema(self.params, self.config.ema_decay) if self.config.use_ema else None
        self.stepper = self._make_stepper()
        self.next_step: int | None = None  # fused_backward: the step to take during backward; None: take none
        self.squared_norms: list[Tensor] = []  # fused_backward: squared norms of the gradients of this step
        self.fused = optimizer.fused_backward
        for param in self.params.values() if self.fused else ():
            # The garbage collector does not follow hooks, so a hook that is not removed keeps engine and model alive.
            self.resources.callback(param.register_post_accumulate_grad_hook(self._step_inside).remove)
        self.exchange: GradientExchange | None = None
        if self.world > 1:
            self.regroup(self.rank, self.world)
            for param in self.params.values():  # a replica must not begin with other random numbers
                dist.broadcast(param.data, src=0)

    @property
    def regroups(self) -> bool:
        return not self.fused  # which changes weights during the backward pass

    def regroup(self, rank: int, world: int) -> None:
        """Continue as ``rank`` of ``world`` workers in the present default process group; drop an unfinished step.

        Collective operations are left to the caller: the workers of the new group must have equal weights and states.
        """
        self.drop_gradients()
        self.rank, self.world, self.is_main = rank, world, rank == 0
        if self.exchange is None and world > 1:
            self.exchange = GradientExchange(
                list(self.params.values()), num_units=self.num_units, by_unit=self.sums_by_unit
            )
            self.resources.callback(self.exchange.close)
        if self.exchange is not None:
            self.exchange.join(rank, world)

    def begin_step(self, rates: dict[str, float], step: int) -> None:
        self._set_rates(rates)
        self.next_step, self.squared_norms = step, []

    def backward(self, batch: Batch, *, last: bool = True) -> Loss:
        exchange = self.exchange if self.world > 1 else None
        if exchange is not None and not (last or exchange.by_unit):
            exchange = None  # this worker adds its own units first
        with self.autocast():
            loss = self.method(batch)
        if exchange is not None:
            exchange.begin()
        self.objective(loss).backward()
        if exchange is not None:
            exchange.end()
        return Loss(loss.total.detach(), loss.per_sample.detach(), loss.extras)

    def objective(self, loss: Loss) -> Tensor:
        """Return the scalar whose gradient one unit adds: its share of the step's loss, scaled under fp16."""
        return self.scaler.scale(loss.total / self.num_units)

    def step(self, rates: dict[str, float], step: int) -> Tensor:
        if self.exchange is not None and self.world > 1:
            self.exchange.finish()
        norm = self._finish_step(step) if self.fused else self._step_together(rates, step)
        self.method.after_step()
        if self.ema is not None:
            self.ema.update(self.params if self._average is None else self._averages(), step)
        return norm.detach()

    def effective_rates(self) -> dict[str, float]:
        if self._effective_rate is None:
            return {}
        return {group["name"]: self._effective_rate(group) for group in self.optimizer.param_groups}

    def drop_gradients(self) -> None:
        if self.exchange is not None:
            self.exchange.reset()
        self.optimizer.zero_grad(set_to_none=True)

    def evaluate(self, action: Callable[[], T]) -> T:
        with self._averaged(lambda param, value: value.to(param.dtype)):
            return action()

    def evaluate_passes(self, passes: Passes[T]) -> Passes[T]:
        with self._averaged(lambda param, value: value.to(param.dtype)):
            return (yield from passes)

    @contextmanager
    def full_weights(self) -> Iterator[None]:
        with self._averaged(
            lambda _, value: value.contiguous()
        ):  # other programs expect the contiguous layout
            yield

    def weights(self) -> dict[str, Tensor]:
        return self.method.state()

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        self.method.load_state(weights)

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "optimizer_name": self.optimizer_name,
        }
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        if self.ema is not None:
            state["ema"] = self.ema.shadow
        elif self._average is not None:
            state["ema"] = self._averages()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        check_optimizer(self.optimizer_name, state)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler.is_enabled() and "scaler" in state:
                self.scaler.load_state_dict(state["scaler"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"the saved optimizer does not fit this recipe's: {error}") from error
        restore_states(self.optimizer, state["optimizer"]["state"])
        self.stepper = self._make_stepper()  # since load_state_dict replaces the groups
        if self.ema is not None:
            average = saved_average(state)
            self.ema.shadow = {
                name: copy_in_layout(self.params[name], t.float()) for name, t in average.items()
            }

    def _set_rates(self, rates: dict[str, float]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]]

    def _step_together(self, rates: dict[str, float], step: int) -> Tensor:
        """Clip the gradients, step all parameters and discard the gradients; return the gradient norm."""
        self._set_rates(rates)
        self.scaler.unscale_(self.optimizer)
        stepped = [param for param in self.params.values() if param.grad is not None]
        norm = torch.nn.utils.get_total_norm([param.grad for param in stepped if param.grad is not None])
        if self.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(stepped, self.max_grad_norm, norm)
        if self.bf16_weights:
            self.stepper.step_all(step)
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _step_inside(self, param: Tensor) -> None:
        """Step a parameter as soon as its gradient is complete (fused_backward), as a hook of the parameter.

        Without a preceding :meth:`begin_step` the gradient is discarded.
        """
        assert isinstance(param, nn.Parameter) and param.grad is not None
        if self.next_step is None:
            param.grad = None
            return
        self.squared_norms.append(param.grad.float().square().sum())
        self.stepper.step(param, self.next_step)

    def _finish_step(self, step: int) -> Tensor:
        """Return the norm of the gradients that were used during backward. Raises RuntimeError for another step."""
        if self.next_step != step:
            raise RuntimeError(
                f"fused_backward: step {step} was not announced with begin_step before its backward"
            )
        self.next_step = None
        return torch.stack(self.squared_norms).sum().sqrt()

    def _make_stepper(self) -> Stepper:
        return Stepper(self.optimizer, seed=self.seed, steps_alone=self.steps_alone)

    def _averages(self) -> dict[str, Tensor]:
        """Return the average that the optimizer computes of the weights, by name."""
        assert self._average is not None
        found = self._average(self.optimizer)
        return {name: found[param] for name, param in self.params.items()}

    @contextmanager
    def _averaged(self, convert: Callable[[nn.Parameter, Tensor], Tensor]) -> Iterator[None]:
        """Within this context the parameters hold the averaged weights (else their own), changed by ``convert``.

        The average is the engine's EMA, or the optimizer's own.
        """
        kept = {name: param.data for name, param in self.params.items()}
        shown: Mapping[str, Tensor] = kept
        if self.ema is not None:
            shown = self.ema.shadow
        elif self._average is not None:
            shown = self._averages()
        for name, param in self.params.items():
            param.data = convert(param, shown[name])
        try:
            yield
        finally:
            for name, param in self.params.items():
                param.data = kept[name]
