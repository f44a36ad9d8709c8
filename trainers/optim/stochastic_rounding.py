"""Runs optimizer steps for some parameters: inside backward, or with stochastic rounding to bfloat16."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dreamfleet.datasets.rng import key

DROPPED_BITS = 16  # mantissa bits of a float32 that a bfloat16 does not have


class Stepper:
    """Runs the step of any torch optimizer for some of its parameters.

    Weights in bfloat16 are stepped in float32 and rounded stochastically: up with a probability proportional
    to the distance from the lower value, so that updates too small for rounding to nearest take effect on
    average (Gupta et al. 2015, arXiv 1502.02551). The random bits are keyed by (seed, step, first parameter),
    so a resumed run rounds identically. The optimizer's states are those of float32 weights.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, seed: int):
        self.optimizer, self.seed = optimizer, seed
        self._groups: dict[nn.Parameter, dict[str, Any]] = {}
        self._parts: list[list[nn.Parameter]] = []
        for group in optimizer.param_groups:
            self._groups |= dict.fromkeys(group["params"], group)
            self._parts += _split(group["params"])
        self._numbers = {param: number for number, param in enumerate(self._groups)}
        self._generators: dict[torch.device, torch.Generator] = {}

    def step(self, param: nn.Parameter, step: int) -> None:
        """Run optimizer step ``step`` (from 1) for one parameter and drop its gradient."""
        self._step([param], step)

    def step_all(self, step: int) -> None:
        """Run optimizer step ``step`` for every parameter with a gradient and drop the gradients.

        Small parameters are stepped together, because launching a kernel for each would take most of the
        time. Float32 copies need no more memory than those of the largest parameter.
        """
        for part in self._parts:
            if params := [param for param in part if param.grad is not None]:
                self._step(params, step)

    @torch.no_grad()
    def _step(self, params: Sequence[nn.Parameter], step: int) -> None:
        if params[0].dtype == torch.bfloat16:
            self._step_bf16(params, step)
        else:
            with self._only(params[0], params):
                self.optimizer.step()
        for param in params:
            param.grad = None

    def _step_bf16(self, params: Sequence[nn.Parameter], step: int) -> None:
        flat, views = _to_float32(params, params)
        wide = [nn.Parameter(view) for view in views]
        _, gradients = _to_float32([param.grad for param in params if param.grad is not None], params)
        for param, copy, gradient in zip(params, wide, gradients, strict=True):
            copy.grad, param.grad = gradient, None
        del gradients, gradient
        self._move_states(params, wide)
        with self._only(params[0], wide):
            self.optimizer.step()
        self._move_states(wide, params)
        for copy in wide:
            copy.grad = None
        round_stochastically(flat, self._generator(params[0], step))
        torch._foreach_copy_(list(params), list(views))

    def _move_states(self, owners: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Move the optimizer states of ``owners`` to ``others``."""
        state = self.optimizer.state
        for owner, other in zip(owners, others, strict=True):
            if owner in state:
                state[other] = state.pop(owner)

    @contextmanager
    def _only(self, param: nn.Parameter, stepped: Sequence[nn.Parameter]) -> Iterator[None]:
        """Within this context the optimizer has only the parameters ``stepped``, with the settings of ``param``."""
        kept = self.optimizer.param_groups
        self.optimizer.param_groups = [{**self._groups[param], "params": list(stepped)}]
        try:
            yield
        finally:
            self.optimizer.param_groups = kept

    def _generator(self, param: nn.Parameter, step: int) -> torch.Generator:
        generator = self._generators.setdefault(param.device, torch.Generator(param.device))
        return generator.manual_seed(key("round", self.seed, step, self._numbers[param]))


def _split(params: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Split parameters in order into parts of one type and device, none larger than the largest parameter."""
    parts: list[list[nn.Parameter]] = []
    params = list(params)
    most, size = max((param.numel() for param in params), default=0), 0
    for _, alike in itertools.groupby(params, key=lambda param: (param.dtype, param.device)):
        part: list[nn.Parameter] = []
        for param in alike:
            if not part or size + param.numel() > most:
                parts.append(part := [])
                size = 0
            part.append(param)
            size += param.numel()
    return parts


def _to_float32(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Copy tensors to one flat float32 tensor; return it, and a view of each in the layout of its ``like``."""
    sizes = [tensor.numel() for tensor in tensors]
    flat = torch.empty(sum(sizes), dtype=torch.float32, device=tensors[0].device)
    views = [
        part.as_strided(other.shape, other.stride())
        for part, other in zip(flat.split(sizes), like, strict=True)
    ]
    torch._foreach_copy_(views, list(tensors))
    return flat, views


def round_stochastically(value: Tensor, generator: torch.Generator) -> None:
    """Round float32 in place to bfloat16 values, up or down with probabilities that preserve the mean."""
    bits = value.view(torch.int32)
    # Floats are sign and magnitude: random bits added below the last kept bit carry into it with the right
    # probability.
    bits += torch.randint(
        1 << DROPPED_BITS, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
    )
    bits &= -(1 << DROPPED_BITS)


def restore_states(
    optimizer: torch.optim.Optimizer, saved: dict[int, dict[str, Any]], *, keep_types: bool
) -> None:
    """Copy states loaded by ``optimizer.load_state_dict`` into the memory layout of their weights.

    New states have that layout, and fused kernels read a weight and its states in memory order.
    ``keep_types`` restores the saved dtypes: torch casts loaded states to the dtype of the weights, which may
    be narrower.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for number, param in enumerate(params):
        for name, value in saved.get(number, {}).items():
            if isinstance(value, Tensor) and name != "step":
                loaded = optimizer.state[param][name]
                optimizer.state[param][name] = copy_in_layout(param, value if keep_types else loaded)


def copy_in_layout(param: Tensor, value: Tensor) -> Tensor:
    """Return a copy of ``value`` on the device of ``param``, in its memory layout if the shapes are equal."""
    if value.shape != param.shape:
        return value.to(param.device, copy=True)
    return torch.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(value)
