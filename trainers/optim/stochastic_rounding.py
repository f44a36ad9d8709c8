"""Runs optimizer steps for some parameters: inside backward, or with stochastic rounding to bfloat16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dreamfleet.datasets.rng import key
from dreamfleet.trainers.optim.param_group import split_by_size

DROPPED_BITS = 16  # mantissa bits of a float32 that a bfloat16 does not have


class Stepper:
    """Runs the step of any torch optimizer for some of its parameters.

    Weights in bfloat16 are stepped in float32 and rounded stochastically: up with a probability proportional
    to the distance from the lower value, so that updates too small for rounding to nearest take effect on
    average (Gupta et al. 2015, arXiv 1502.02551). The random bits are keyed by (seed, step, first parameter),
    so a resumed run rounds identically. The optimizer's states are those of float32 weights. ``steps_alone``: False
    if all parameters must be stepped together, because the optimizer keeps numbers for all of a group.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, seed: int, steps_alone: bool = True):
        self.optimizer, self.seed = optimizer, seed
        self._groups: dict[nn.Parameter, dict[str, Any]] = {}
        self._parts: list[list[nn.Parameter]] = []
        for group in optimizer.param_groups:
            self._groups |= dict.fromkeys(group["params"], group)
            self._parts += split_by_size(group["params"])
        if not steps_alone:
            self._parts = [list(self._groups)]
        self._numbers = {param: number for number, param in enumerate(self._groups)}
        self._generators: dict[torch.device, torch.Generator] = {}

    def step(self, param: nn.Parameter, step: int) -> None:
        """Run optimizer step ``step`` (from 1) for one parameter and drop its gradient."""
        self._step([param], step)

    def step_all(self, step: int) -> None:
        """Run optimizer step ``step`` for every parameter with a gradient and drop the gradients.

        Small parameters are stepped together, because launching a kernel for each would take most of the
        time. Float32 copies need no more memory than those of the largest parameter, unless all must be stepped
        together.
        """
        for part in self._parts:
            if params := [param for param in part if param.grad is not None]:
                self._step(params, step)

    @torch.no_grad()
    def _step(self, params: Sequence[nn.Parameter], step: int) -> None:
        narrow = [param for param in params if param.dtype == torch.bfloat16]
        if narrow:
            self._step_bf16(params, narrow, step)
        else:
            with self._only(params, params):
                self.optimizer.step()
        for param in params:
            param.grad = None

    def _step_bf16(self, params: Sequence[nn.Parameter], narrow: Sequence[nn.Parameter], step: int) -> None:
        """Step ``params``, of which those in ``narrow`` are bfloat16."""
        flat, views = _to_float32(narrow, narrow)
        wide = [nn.Parameter(view) for view in views]
        _, gradients = _to_float32([param.grad for param in narrow if param.grad is not None], narrow)
        for param, copy, gradient in zip(narrow, wide, gradients, strict=True):
            copy.grad, param.grad = gradient, None
        del gradients, gradient
        self._move_states(narrow, wide)
        copies = dict(zip(narrow, wide, strict=True))
        with self._only(params, [copies.get(param, param) for param in params]):
            self.optimizer.step()
        self._move_states(wide, narrow)
        for copy in wide:
            copy.grad = None
        round_stochastically(flat, self._generator(narrow[0], step))
        torch._foreach_copy_(list(narrow), list(views))

    def _move_states(self, owners: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Move the optimizer states of ``owners`` to ``others``."""
        state = self.optimizer.state
        for owner, other in zip(owners, others, strict=True):
            if owner in state:
                state[other] = state.pop(owner)

    @contextmanager
    def _only(self, params: Sequence[nn.Parameter], stepped: Sequence[nn.Parameter]) -> Iterator[None]:
        """Within this context the optimizer has only the parameters ``stepped``, in the groups of ``params``."""
        groups: dict[int, tuple[dict[str, Any], list[nn.Parameter]]] = {}
        for param, copy in zip(params, stepped, strict=True):
            group = self._groups[param]
            groups.setdefault(id(group), (group, []))[1].append(copy)
        kept = self.optimizer.param_groups
        kept_params = [(group, group["params"]) for group, _ in groups.values()]
        for group, copies in groups.values():
            group["params"] = copies  # in the group itself, in which some optimizers count their steps
        self.optimizer.param_groups = [group for group, _ in groups.values()]
        try:
            yield
        finally:
            self.optimizer.param_groups = kept
            for group, before in kept_params:
                group["params"] = before

    def _generator(self, param: nn.Parameter, step: int) -> torch.Generator:
        generator = self._generators.setdefault(param.device, torch.Generator(param.device))
        return generator.manual_seed(key("round", self.seed, step, self._numbers[param]))


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


def restore_states(optimizer: torch.optim.Optimizer, saved: dict[int, dict[str, Any]]) -> None:
    """Replace states loaded by ``optimizer.load_state_dict`` by copies of the saved ones, in the layout of the weights.

    New states have that layout, and fused kernels read a weight and its states in memory order. The copies have the
    saved dtypes: torch casts loaded states to the dtype of the weights, which may be another one.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for number, param in enumerate(params):
        for name, value in saved.get(number, {}).items():
            if isinstance(value, Tensor) and name != "step":
                optimizer.state[param][name] = copy_in_layout(param, value)


def copy_in_layout(param: Tensor, value: Tensor) -> Tensor:
    """Return a copy of ``value`` on the device of ``param``, in its memory layout if the shapes are equal."""
    if value.shape != param.shape:
        return value.to(param.device, copy=True)
    return torch.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(value)
