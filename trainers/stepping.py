"""Steps an optimizer one parameter at a time: inside backward, and over bfloat16 weights with stochastic rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dreamfleet.datasets.keyed import key

DROPPED_BITS = 16  # of a float32's mantissa, which a bfloat16 does not have


class Stepper:
    """Any torch optimizer, made to step a single parameter.

    A weight in bfloat16 is stepped in float32 and rounded stochastically: up with the chance of its distance from
    below, so that updates too small to be seen by rounding to nearest still arrive on average (Gupta et al. 2015, arXiv
    1502.02551). The rounding's randomness is keyed by (seed, step, parameter), so a resumed run rounds alike. States
    are those of float32 weights.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, seed: int):
        self.optimizer, self.seed = optimizer, seed
        self._places = {
            param: (group, number)
            for number, (group, param) in enumerate(
                (group, param) for group in optimizer.param_groups for param in group["params"]
            )
        }
        self._generators: dict[torch.device, torch.Generator] = {}

    def step(self, param: nn.Parameter, step: int) -> None:
        """Do optimizer step ``step`` (from 1) of one parameter, and drop its gradient."""
        if param.dtype == torch.bfloat16:
            self._step_narrow(param, step)
        else:
            with self._only(param, param):
                self.optimizer.step()
        param.grad = None

    def step_all(self, step: int) -> None:
        """Do optimizer step ``step`` of every parameter that has a gradient."""
        for param in self._places:
            if param.grad is not None:
                self.step(param, step)

    @torch.no_grad()
    def _step_narrow(self, param: nn.Parameter, step: int) -> None:
        assert param.grad is not None
        state, wide = self.optimizer.state, nn.Parameter(param.detach().float())
        wide.grad, param.grad = param.grad.float(), None
        if param in state:
            state[wide] = state.pop(param)
        with self._only(param, wide):
            self.optimizer.step()
        if wide in state:
            state[param] = state.pop(wide)
        wide.grad = None
        param.copy_(round_stochastically(wide.detach(), self._generator(param, step)))

    @contextmanager
    def _only(self, param: nn.Parameter, stepped: nn.Parameter) -> Iterator[None]:
        """Within this context the optimizer has one parameter, ``stepped``, with the settings of ``param``."""
        kept = self.optimizer.param_groups
        self.optimizer.param_groups = [{**self._places[param][0], "params": [stepped]}]
        try:
            yield
        finally:
            self.optimizer.param_groups = kept

    def _generator(self, param: nn.Parameter, step: int) -> torch.Generator:
        generator = self._generators.setdefault(param.device, torch.Generator(param.device))
        return generator.manual_seed(key("round", self.seed, step, self._places[param][1]))


def round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16, up or down with the chances that keep the mean; overwrites ``value``."""
    bits = value.view(torch.int32)
    # Sign and magnitude: to add below the last bit that stays makes the magnitude carry over with the right chance.
    bits += torch.randint(
        1 << DROPPED_BITS, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
    )
    bits &= -(1 << DROPPED_BITS)
    return value.to(torch.bfloat16)


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
