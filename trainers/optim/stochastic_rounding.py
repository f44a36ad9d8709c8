"""Steps an optimizer over some of its parameters: inside backward, and over bfloat16 weights with their rounding."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dreamfleet.datasets.rng import key

DROPPED_BITS = 16  # of a float32's mantissa, which a bfloat16 does not have


class Stepper:
    """Any torch optimizer, made to step some of its parameters.

    Weights in bfloat16 are stepped in float32 and rounded stochastically: up with the chance of their distance from
    below, so that updates too small for rounding to nearest still arrive on average (Gupta et al. 2015, arXiv
    1502.02551). The rounding's randomness is keyed by (seed, step, first parameter), so a resumed run rounds alike.
    States are those of float32 weights.
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
        """Do optimizer step ``step`` (from 1) of one parameter, and drop its gradient."""
        self._step([param], step)

    def step_all(self, step: int) -> None:
        """Do optimizer step ``step`` of every parameter that has a gradient, and drop the gradients.

        Many small parameters are stepped at once: the time of a kernel's start would be most of theirs. Copies in
        float32 take no more memory than those of the largest parameter.
        """
        for part in self._parts:
            if params := [param for param in part if param.grad is not None]:
                self._step(params, step)

    @torch.no_grad()
    def _step(self, params: Sequence[nn.Parameter], step: int) -> None:
        if params[0].dtype == torch.bfloat16:
            self._step_narrow(params, step)
        else:
            with self._only(params[0], params):
                self.optimizer.step()
        for param in params:
            param.grad = None

    def _step_narrow(self, params: Sequence[nn.Parameter], step: int) -> None:
        flat, views = _widened(params, params)
        wide = [nn.Parameter(view) for view in views]
        _, gradients = _widened([param.grad for param in params if param.grad is not None], params)
        for param, copy, gradient in zip(params, wide, gradients, strict=True):
            copy.grad, param.grad = gradient, None
        del gradients, gradient
        self._hand_over(params, wide)
        with self._only(params[0], wide):
            self.optimizer.step()
        self._hand_over(wide, params)
        for copy in wide:
            copy.grad = None
        round_stochastically(flat, self._generator(params[0], step))
        torch._foreach_copy_(list(params), list(views))

    def _hand_over(self, owners: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Make the states of parameters those of others."""
        state = self.optimizer.state
        for owner, other in zip(owners, others, strict=True):
            if owner in state:
                state[other] = state.pop(owner)

    @contextmanager
    def _only(self, param: nn.Parameter, stepped: Sequence[nn.Parameter]) -> Iterator[None]:
        """Within this context the optimizer has the parameters ``stepped`` alone, with the settings of ``param``."""
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
    """Split parameters, in their order, into parts of one type and device, none larger than the largest parameter."""
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


def _widened(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Copy tensors to float32, end to end: return all of them, and a view of each in the layout of its ``like``."""
    sizes = [tensor.numel() for tensor in tensors]
    flat = torch.empty(sum(sizes), dtype=torch.float32, device=tensors[0].device)
    views = [
        part.as_strided(other.shape, other.stride())
        for part, other in zip(flat.split(sizes), like, strict=True)
    ]
    torch._foreach_copy_(views, list(tensors))
    return flat, views


def round_stochastically(value: Tensor, generator: torch.Generator) -> None:
    """Round float32 in place to what bfloat16 holds, up or down with the chances that keep the mean."""
    bits = value.view(torch.int32)
    # Sign and magnitude: to add below the last bit that stays makes the magnitude carry over with the right chance.
    bits += torch.randint(
        1 << DROPPED_BITS, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
    )
    bits &= -(1 << DROPPED_BITS)


def restore_states(
    optimizer: torch.optim.Optimizer, saved: dict[int, dict[str, Any]], *, keep_types: bool
) -> None:
    """Finish what ``optimizer.load_state_dict`` began: states in the layout of their weights, as they would be made.

    Fused kernels walk through the bytes of a weight and its states side by side. ``keep_types`` puts the saved types
    back: torch's load casts states to the weights' type, which may be narrower.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for number, param in enumerate(params):
        for name, value in saved.get(number, {}).items():
            if isinstance(value, Tensor) and name != "step":
                loaded = optimizer.state[param][name]
                optimizer.state[param][name] = laid_out_like(param, value if keep_types else loaded)


def laid_out_like(param: Tensor, value: Tensor) -> Tensor:
    """Return a copy of ``value`` on the device of ``param``, and in its layout where the shapes are equal."""
    if value.shape != param.shape:
        return value.to(param.device, copy=True)
    return torch.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(value)
