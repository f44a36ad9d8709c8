"""Reads and writes the float32 weights and the moments of a DeepSpeed optimizer by parameter name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dreamfleet.trainers.engines import deepspeed_internals as internals


class Shards:
    """Reads and writes full-precision weights, unsharded and by parameter name, at every ZeRO stage.

    ``flats`` are the tensors that DeepSpeed's inner optimizer steps: the parameters themselves (stage 0), or this
    rank's part of all parameters of a group, concatenated (stages 1 to 3). The optimizer's states named in ``moments``
    and EMA weights have the same layout; within :meth:`showing` or :meth:`holding` they are accessed in place of the
    weights. All ranks must call :meth:`gather` and :meth:`put` for the same parameters in the same order.
    """

    def __init__(
        self,
        engine: Any,
        params: Mapping[str, nn.Parameter],
        inner: torch.optim.Optimizer,
        *,
        stage: int,
        moments: Sequence[str] = ("exp_avg", "exp_avg_sq"),
    ):
        self.moments = tuple(moments)
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
        """Overwrite this rank's part of a float32 parameter with the unsharded ``value``.

        The weights that the model computes with change only at :meth:`publish`.
        """
        param: Any = self.params[name]
        if self.stage == 0:
            param.data.copy_(value)
        elif self.stage == 3:
            part = self._part(param)
            start = min(self.rank * len(part), value.numel())
            mine = value.flatten()[start : start + len(part)]
            part[: len(mine)].copy_(mine)  # the rest is padding, since all ranks' parts have equal sizes
            self._mark_written()
        else:
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(param, value)

    def publish(self) -> None:
        """Copy the full-precision weights into the weights that the model computes with. All ranks must call it."""
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
        """Number of optimizer steps since the moments were created."""
        # If the first step was skipped because of an fp16 overflow, the state may be empty.
        return float(self.inner.state.get(self.flats[0], {}).get("step", 0))

    def make_moments(self, make_step: Callable[[Tensor], int | Tensor]) -> None:
        """Create zero moments, so that a checkpoint can be loaded before the optimizer's first step creates them.

        ``make_step`` returns the number of steps taken, as a new tensor at each call, since optimizers increment it in
        place.
        """
        for number in range(len(self.flats)):
            flat = self._flat(number)
            moments = {name: torch.zeros_like(flat, requires_grad=False) for name in self.moments}
            self.inner.state[flat] = {"step": make_step(flat), **moments}
            self._mark_written()
        self.rest()

    @contextmanager
    def showing(self, moment: str) -> Iterator[None]:
        """Within this context :meth:`gather` and :meth:`put` access a state of the optimizer, one of ``moments``."""
        with self.holding([self.inner.state[flat][moment] for flat in self.flats]):
            yield

    @contextmanager
    def holding(self, others: Sequence[Tensor]) -> Iterator[None]:
        """Within this context the contents of ``flats`` and ``others`` are exchanged."""
        self._exchange(others)
        try:
            yield
        finally:
            self._exchange(others)

    def rest(self) -> None:
        """Release the memory of the last accessed tensor before training continues; only swapped shards need it."""

    def _flat(self, number: int) -> Tensor:
        """Return flat tensor ``number`` of the weights, or of the moment that :meth:`showing` selected."""
        return self.flats[number]

    def _mark_written(self) -> None:
        """Record that the last tensor returned by :meth:`_flat` was modified."""

    def _part(self, param: nn.Parameter) -> Tensor:
        """Return this rank's part of a parameter at stage 3, a view into the tensor of its sub-group."""
        number, start, length = internals.partition_position(self.outer, param)
        return self._flat(number).detach().narrow(0, start, length)

    @torch.no_grad()
    def _exchange(self, others: Sequence[Tensor]) -> None:
        for flat, other in zip(self.flats, others, strict=True):
            kept = flat.detach().clone()
            flat.data.copy_(other)
            other.copy_(kept)


def owners(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the outermost modules that directly own parameters, without duplicates.

    LoRA modules belong to both the method and the U-Net, so they are found twice.
    """

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if module._parameters:
            yield module
        else:
            yield from itertools.chain.from_iterable(map(walk, module.children()))

    return list(dict.fromkeys(itertools.chain.from_iterable(map(walk, roots))))
