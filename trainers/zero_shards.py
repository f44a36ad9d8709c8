"""The fp32 weights inside a DeepSpeed optimizer: this rank's part of them, gathered whole and put back by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Shards:
    """Reads and writes the full-precision weights of an engine, whole and by parameter name, at every ZeRO stage.

    ``flats`` are the tensors that DeepSpeed's inner optimizer steps on: the parameters themselves (stage 0), or this
    rank's part of all parameters of a group, laid end to end (1 to 3). Adam's moments and averaged weights have the
    same layout, so they are read and written by :meth:`holding` them in the place of the weights. Every rank must call
    :meth:`gather` and :meth:`put`, for the same parameters in the same order.
    """

    def __init__(self, engine: Any, params: Mapping[str, nn.Parameter], *, stage: int):
        self.params, self.stage, self.rank = params, stage, engine.global_rank
        self.flats: Sequence[Tensor] = (
            list(params.values())
            if stage == 0
            else engine.optimizer.single_partition_of_fp32_groups
            if stage < 3
            else engine.optimizer.fp32_partitioned_groups_flat
        )

    def gather(self, name: str) -> Tensor:
        """Return a copy of the whole parameter in float32, on the training device."""
        if self.stage == 0:
            return self.params[name].detach().float().clone()
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(self.params[name]).detach()

    def put(self, name: str, value: Tensor) -> None:
        """Overwrite this rank's part of a parameter in full precision; what the model computes with stays as it is."""
        param: Any = self.params[name]
        if self.stage == 0:
            param.data.copy_(value)
        elif self.stage < 3:
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(param, value)
        else:
            from deepspeed.utils import safe_set_local_fp32_param

            # The whole-parameter call of stage 3 fails where the parts need padding to be of equal size.
            size = param.ds_tensor.numel()
            start = min(self.rank * size, value.numel())
            part = value.flatten()[start : start + size]
            safe_set_local_fp32_param(param, F.pad(part, (0, size - part.numel())))

    def put_everywhere(self, name: str, value: Tensor) -> None:
        """Overwrite a parameter in full precision and in what the model computes with."""
        self.put(name, value)
        param = self.params[name]
        if self.stage < 3:
            param.data.copy_(value)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
            param.data.copy_(value)

    @contextmanager
    def holding(self, others: Sequence[Tensor]) -> Iterator[None]:
        """Exchange the contents of ``flats`` and ``others`` for the length of this context."""
        self._exchange(others)
        try:
            yield
        finally:
            self._exchange(others)

    @torch.no_grad()
    def _exchange(self, others: Sequence[Tensor]) -> None:
        for flat, other in zip(self.flats, others, strict=True):
            kept = flat.detach().clone()
            flat.data.copy_(other)
            other.copy_(kept)
