"""Sums the gradients of a step's units over the workers: in the order of the units, or with an all-reduce."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 2**25  # of gradients in one message: enough for full bandwidth, and the sends start early
IN_FLIGHT = 2  # buckets that are sent before the first of them is summed
ALIGNED = (
    64  # elements: parts of a flat buffer start where a tensor of their own could, so that norms are equal
)


class GradientExchange:
    """Sums the gradients of ``num_units`` units over the workers, and leaves the sum in every worker's parameters.

    In round k the workers compute the units k * world to (k + 1) * world - 1. With ``by_unit``, every round ends with
    an exchange (:class:`_UnitOrder`), and the sum is equal in every bit on any number of workers. Otherwise each worker
    adds its own units, and the last round ends with an all-reduce (:class:`_AllReduce`), which sends less.

    A bucket of gradients is sent as soon as the backward pass has computed it. Parameters without a gradient count as
    zero. Every worker calls :meth:`begin`, :meth:`end` and :meth:`finish` in the same order; a worker without a unit in
    the last round calls only :meth:`finish`.
    """

    def __init__(self, params: Sequence[nn.Parameter], *, num_units: int, by_unit: bool):
        self.num_units, self.by_unit = num_units, by_unit
        self.buckets = _fill_buckets(params)
        self.rank, self.world = 0, 1
        self._homes = {param: number for number, bucket in enumerate(self.buckets) for param in bucket.params}
        self._hooks = [param.register_post_accumulate_grad_hook(self._see) for param in self._homes]
        self.reset()

    @property
    def rounds(self) -> int:
        """The number of exchanges per step."""
        return -(-self.num_units // self.world) if self.by_unit else 1

    def join(self, rank: int, world: int) -> None:
        """Use the present default process group, in which this worker has ``rank``; drop an unfinished step."""
        self.rank, self.world = rank, world
        self.reset()

    def reset(self) -> None:
        """Drop the sums of an unfinished step."""
        self._round, self._active, self._is_open, self._next = 0, 0, False, 0
        kind = _UnitOrder if self.by_unit else _AllReduce
        self._sums: list[_Sum] = [kind(bucket, self.rank, self.world) for bucket in self.buckets]
        self._sent: deque[_Sum] = deque()
        self._ready = [0] * len(self.buckets)

    def begin(self) -> None:
        """Start a round, before the backward pass of this worker's unit; its gradients are sent as they appear."""
        self._active = min(self.world, self.num_units - self._round * self.world)
        self._is_open, self._next, self._ready = True, 0, [0] * len(self.buckets)

    def end(self) -> None:
        """Send what the backward pass left, and add what the other workers sent; the parameters' gradients are None."""
        while self._next < len(self.buckets):
            self._send()
        while self._sent:
            self._sent.popleft().add()
        self._round, self._is_open = self._round + 1, False

    def finish(self) -> None:
        """Complete the rounds of a step, and set every parameter's gradient to the sum over all units."""
        while self._round < self.rounds:
            self.begin()
            self.end()
        for bucket, each in zip(self.buckets, self._sums, strict=True):
            bucket.unpack(each.whole().to(bucket.params[0].device))
        self.reset()

    def close(self) -> None:
        """Remove the hooks from the parameters; otherwise they would keep this object alive."""
        for hook in self._hooks:
            hook.remove()

    def _see(self, param: Tensor) -> None:
        """Send each bucket that is complete, in the same order on every worker."""
        if not self._is_open:
            return
        assert isinstance(param, nn.Parameter)
        self._ready[self._homes[param]] += 1
        while self._next < len(self.buckets) and self._ready[self._next] == len(
            self.buckets[self._next].params
        ):
            self._send()

    def _send(self) -> None:
        """Send the next bucket."""
        self._sums[self._next].send(self._active)
        self._sent.append(self._sums[self._next])
        self._next += 1
        if len(self._sent) > IN_FLIGHT:
            self._sent.popleft().add()


class _Sum(ABC):
    """The sum of one bucket's gradients over the units of a step, as one worker of ``world``."""

    def __init__(self, bucket: _Bucket, rank: int, world: int):
        self.bucket, self.rank, self.world = bucket, rank, world
        self._work: Any = None  # the exchange in progress

    @abstractmethod
    def send(self, active: int) -> None:
        """Start the exchange of a round in which the first ``active`` workers have a unit; take the gradients."""

    @abstractmethod
    def add(self) -> None:
        """Wait for that exchange, and add its units."""

    @abstractmethod
    def whole(self) -> Tensor:
        """Return the sum as a flat buffer, after the last round."""


class _UnitOrder(_Sum):
    """Adds the units in their order: each worker owns an equal part of the gradients and adds that part of every unit.

    The parts are sent with an all-to-all, and the sums are gathered after the last round. An all-reduce adds in an
    order that depends on the number of workers, and so does a worker that first adds its own units. Here the order is
    always that of one worker that computes all units, so with equal gradients the sum is equal in every bit.

    With p bytes of gradients, a worker sends p bytes per round and p for the gathering: as much as an all-reduce (2 p)
    if the step has one round. Between nodes of several GPUs, the all-to-all crosses a node's link more often than a
    ring does.
    """

    def __init__(self, bucket: _Bucket, rank: int, world: int):
        super().__init__(bucket, rank, world)
        self._own: Tensor | None = None  # this worker's part of the sum so far
        self._found = self._given = torch.empty(0)  # parts that are received, and sent

    def send(self, active: int) -> None:
        part, device = self.bucket.part(self.world), _exchange_device(self.bucket.params[0].device)
        sends = self.rank < active
        self._given = self.bucket.pack(part * self.world, device) if sends else self.bucket.empty(0, device)
        self._found = self.bucket.empty(part * active, device).view(active, part)
        size = part * self._found.element_size()
        self._work = dist.all_to_all_single(
            self._found.view(-1).view(torch.uint8),
            self._given.view(torch.uint8),
            [size * (rank < active) for rank in range(self.world)],
            [size * sends] * self.world,
            async_op=True,
        )

    def add(self) -> None:
        self._work.wait()
        for unit in self._found:
            self._own = unit.clone() if self._own is None else self._own.add_(unit)
        self._found = self._given = torch.empty(0)

    def whole(self) -> Tensor:
        assert self._own is not None
        whole = self._own.new_empty(self.world * len(self._own))
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # until torch 2.12
        gather(whole.view(torch.uint8), self._own.view(torch.uint8))
        self._own = None
        return whole


class _AllReduce(_Sum):
    """Adds the workers' sums of their own units with an all-reduce; rounding depends on the number of workers.

    With p bytes of gradients, a worker sends 2 p per step.
    """

    def __init__(self, bucket: _Bucket, rank: int, world: int):
        super().__init__(bucket, rank, world)
        self._flat = torch.empty(0)

    def send(self, active: int) -> None:
        self._flat = self.bucket.pack(self.bucket.size, _exchange_device(self.bucket.params[0].device))
        self._work = dist.all_reduce(self._flat, async_op=True)

    def add(self) -> None:
        self._work.wait()

    def whole(self) -> Tensor:
        flat, self._flat = self._flat, torch.empty(0)
        return flat


class _Bucket:
    """Parameters of one data type whose gradients are sent in one message, and where each begins in it."""

    def __init__(self, params: Sequence[nn.Parameter]):
        self.params, self.starts, self.size = list(params), list[int](), 0
        for param in params:
            self.starts.append(self.size)
            self.size += _aligned(param.numel())

    def part(self, world: int) -> int:
        """Return the number of elements that each of ``world`` workers owns."""
        return _aligned(-(-self.size // world))

    def empty(self, elements: int, device: torch.device) -> Tensor:
        """Return an uninitialised flat buffer."""
        return torch.empty(elements, dtype=self.params[0].dtype, device=device)

    def pack(self, elements: int, device: torch.device) -> Tensor:
        """Return the gradients as a flat buffer of ``elements``, and remove them from the parameters."""
        flat = torch.zeros(elements, dtype=self.params[0].dtype, device=device)
        for param, view in zip(self.params, self._views(flat), strict=True):
            if param.grad is not None:
                view.copy_(param.grad)
                param.grad = None
        return flat

    def unpack(self, flat: Tensor) -> None:
        """Set the parameters' gradients to views of a flat buffer."""
        for param, view in zip(self.params, self._views(flat), strict=True):
            param.grad = view

    def _views(self, flat: Tensor) -> list[Tensor]:
        return [
            flat.as_strided(param.shape, param.stride(), start)
            for param, start in zip(self.params, self.starts, strict=True)
        ]


def _fill_buckets(params: Sequence[nn.Parameter]) -> list[_Bucket]:
    """Return buckets in about the order in which a backward pass computes the gradients: from the last parameter."""
    groups: dict[torch.dtype, list[list[nn.Parameter]]] = {}
    sizes: dict[torch.dtype, int] = {}
    for param in reversed(params):
        size = param.numel() * param.element_size()
        if sizes.get(param.dtype, BUCKET_BYTES) + size > BUCKET_BYTES:
            groups.setdefault(param.dtype, []).append([])
            sizes[param.dtype] = 0
        groups[param.dtype][-1].append(param)
        sizes[param.dtype] += size
    return [_Bucket(found) for same in groups.values() for found in same]


def _exchange_device(device: torch.device) -> torch.device:
    """Return where gradients are exchanged: gloo exchanges tensors in host memory only."""
    return device if device.type == "cuda" and "nccl" in dist.get_backend() else torch.device("cpu")


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNED) * ALIGNED
