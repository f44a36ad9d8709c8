"""Reads and writes the float32 weights and moments inside a DeepSpeed optimizer by parameter name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dreamfleet.trainers.engines import deepspeed_internals as internals

MOMENTS = ("exp_avg", "exp_avg_sq")


class Shards:
    """Reads and writes an engine's full-precision weights, unsharded and by parameter name, at every ZeRO stage.

    ``flats`` are the tensors that DeepSpeed's inner optimizer steps: the parameters themselves (stage 0), or this
    rank's part of all parameters of a group, concatenated (1 to 3). Adam's moments and averaged weights have the same
    layout; within :meth:`showing` or :meth:`holding` they are read and written in place of the weights. Every rank must
    call :meth:`gather` and :meth:`put`, for the same parameters in the same order.
    """

    def __init__(
        self, engine: Any, params: Mapping[str, nn.Parameter], inner: torch.optim.Optimizer, *, stage: int
    ):
        self.outer, self.inner, self.params = internals.zero_optimizer(engine), inner, params
        self.stage, self.rank = stage, internals.rank_of(engine)
        self.flats: Sequence[Tensor] = (
            internals.fp32_partitions(self.outer, stage=stage) if stage else list(params.values())
        )

    def gather(self, name: str) -> Tensor:
        """Return an unsharded float32 copy of a parameter on the training device."""
        param: Any = self.params[name]
        if self.stage == 0:
            return param.detach().float().clone()
        if self.stage == 3:
            return internals.gather_fp32(self.outer, param, self._part(param))
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(param).detach()

    def put(self, name: str, value: Tensor) -> None:
        """Overwrite this rank's full-precision part of a parameter; the model's own copy changes at :meth:`publish`."""
        param: Any = self.params[name]
        if self.stage == 0:
            param.data.copy_(value)
        elif self.stage == 3:
            part = self._part(param)
            start = min(self.rank * len(part), value.numel())
            mine = value.flatten()[start : start + len(part)]
            part[: len(mine)].copy_(mine)  # the rest is padding: parts have equal sizes
            self._mark_written()
        else:
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(param, value)

    def publish(self) -> None:
        """Copy the full-precision weights into the weights that the model computes with; every rank calls."""
        if self.stage == 3:
            for number in range(len(self.flats)):
                self._flat(number)
                internals.publish_partition(self.outer, number)
            self.rest()
            internals.publish_persistent(self.outer)
        elif self.stage:
            internals.publish_all(self.outer)

    @property
    def steps(self) -> float:
        """Number of steps since the optimizer's moments were created."""
        # A step that fp16 skipped may leave an empty state.
        return float(self.inner.state.get(self.flats[0], {}).get("step", 0))

    def make_moments(self, make_step: Callable[[Tensor], int | Tensor]) -> None:
        """Create zero moments, which the optimizer lacks before its first step, so that they can be overwritten.

        ``make_step`` returns the number of steps taken, a new tensor at each call: optimizers increment it in place.
        """
        for number in range(len(self.flats)):
            flat = self._flat(number)
            moments = {name: torch.zeros_like(flat, requires_grad=False) for name in MOMENTS}
            self.inner.state[flat] = {"step": make_step(flat), **moments}
            self._mark_written()
        self.rest()

    @contextmanager
    def showing(self, moment: str) -> Iterator[None]:
        """Within this context :meth:`gather` and :meth:`put` access one of the optimizer's moments."""
        with self.holding([self.inner.state[flat][moment] for flat in self.flats]):
            yield

    @contextmanager
    def holding(self, others: Sequence[Tensor]) -> Iterator[None]:
        """Exchange the contents of ``flats`` and ``others`` within this context."""
        self._exchange(others)
        try:
            yield
        finally:
            self._exchange(others)

    def rest(self) -> None:
        """Release the memory of the tensor that was read or written last, before training continues."""

    def _flat(self, number: int) -> Tensor:
        """Return a flat tensor of weights, or of what :meth:`showing` selected."""
        return self.flats[number]

    def _mark_written(self) -> None:
        """Record that the tensor returned last by :meth:`_flat` was overwritten."""

    def _part(self, param: nn.Parameter) -> Tensor:
        """Return this rank's part of a parameter under stage 3, within its sub-group's tensor."""
        number, start, length = internals.partition_position(self.outer, param)
        return self._flat(number).detach().narrow(0, start, length)

    @torch.no_grad()
    def _exchange(self, others: Sequence[Tensor]) -> None:
        for flat, other in zip(self.flats, others, strict=True):
            kept = flat.detach().clone()
            flat.data.copy_(other)
            other.copy_(kept)


def owners(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the outermost modules with parameters of their own, each once: LoRA's are in the method and the U-Net."""

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if module._parameters:
            yield module
        else:
            yield from itertools.chain.from_iterable(map(walk, module.children()))

    return list(dict.fromkeys(itertools.chain.from_iterable(map(walk, roots))))
