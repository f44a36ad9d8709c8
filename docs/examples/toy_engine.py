"""An engine for one device that scales the gradient to a fixed norm before each optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from dreamfleet.datasets.config_base import Section
from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.config.engine import EngineConfig
from dreamfleet.trainers.config.engines import ENGINES
from dreamfleet.trainers.config.optimizer import OptimizerConfig
from dreamfleet.trainers.engines.base import Engine, check_optimizer
from dreamfleet.trainers.methods.base import Batch, Loss
from dreamfleet.trainers.optim.optimizers import make_optimizer

T = TypeVar("T")


class ToyOptions(Section):
    """The keys of ``engine.options``."""

    gradient_norm: float = Field(1.0, gt=0, description="the norm that each step's gradient is scaled to")


@ENGINES.register("toy")
class ToyEngine(Engine):
    """Scales the gradient to a fixed norm; runs on one device."""

    Options = ToyOptions

    @classmethod
    def refused(cls, config: EngineConfig) -> Mapping[str, str]:
        return {
            "optimizer.fused_backward": "which runs the optimizer step after the backward pass",
            "engine.use_ema": "which does not support EMA weights",
        }

    def _build(self, optimizer: OptimizerConfig) -> None:
        if self.world > 1:
            raise RecipeError("engine.name: toy runs on one device; set scaling.num_workers: 1")
        self.optimizer = make_optimizer(self.groups, optimizer)

    def backward(self, batch: Batch, *, last: bool = True) -> Loss:
        with self.autocast():
            loss = self.method(batch)
        (loss.total / self.num_units).backward()
        return Loss(loss.total.detach(), loss.per_sample.detach(), loss.extras)

    def step(self, rates: dict[str, float], step: int) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        gradients = [param.grad for param in self.params.values() if param.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, self.options.gradient_norm / float(norm))
        self.optimizer.step()
        self.drop_gradients()
        return norm

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def evaluate(self, action: Callable[[], T]) -> T:
        return action()

    @contextmanager
    def full_weights(self) -> Iterator[None]:
        yield  # nothing is sharded

    def weights(self) -> dict[str, Tensor]:
        return self.method.state()

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        self.method.load_state(weights)

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "optimizer_name": self.optimizer_name}

    def load_state(self, state: dict[str, Any]) -> None:
        check_optimizer(self.optimizer_name, state)
        self.optimizer.load_state_dict(state["optimizer"])
