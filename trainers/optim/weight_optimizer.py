"""The base class of this project's optimizers, which step each weight by an update of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class WeightOptimizer(torch.optim.Optimizer):
    """An optimizer of float32 weights with decoupled weight decay, without synchronisation with the device.

    The state of a weight is the number of its steps and what :meth:`new_state` returns. A subclass defines
    :meth:`make_update`, or :meth:`step_weights` to step several weights at once.
    """

    def new_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return the state of a weight before its first step."""
        raise NotImplementedError

    def make_update(self, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """Change the state of a weight and return its update, which is subtracted after multiplication by ``lr``.

        The update has the weight's shape, or is a matrix ``[first, rest]`` of it.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # closures are not supported
        """Step every parameter that has a gradient."""
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                if not self.state[param]:
                    # The count is on the host, as in torch's own optimizers.
                    self.state[param] = {"step": torch.zeros(()), **self.new_state(param)}
                self.state[param]["step"] += 1
            self.step_weights(params, group)

    def step_weights(self, params: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        """Step the parameters of a group, which have gradients, states and step counts."""
        for param in params:
            assert param.grad is not None
            update = self.make_update(param.grad, self.state[param], group)
            if group["weight_decay"]:
                param.mul_(1 - group["lr"] * group["weight_decay"])
            param.add_(update.view_as(param), alpha=-group["lr"])


def as_matrix(tensor: Tensor) -> Tensor:
    """Reshape a tensor of more than two dimensions to ``[first, rest]``; return others as they are."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor
