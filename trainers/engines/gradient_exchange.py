"""Sums the gradients of a step's units over the workers, in the order of the units."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

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

    In round k the workers compute the units k * world to (k + 1) * world - 1. Each worker owns an equal part of the
    flat gradients, receives that part from the others (all-to-all) and adds the units in their order. After the last
    round the sums are gathered. An all-reduce adds in an order that depends on the number of workers, and so does a
    worker that first adds its own units. Here the order is always that of one worker that computes all units, so with
    equal gradients the sum is equal in every bit.

    A bucket of gradients is sent as soon as the backward pass has computed it. With p bytes of gradients, a worker
    sends p bytes per round and p for the gathering: as much as an all-reduce (2 p) if the step has one round. With
    ``by_unit`` false each worker adds its own units first, and there is one round per step.

    Parameters without a gradient count as zero. Every worker calls :meth:`begin`, :meth:`end` and :meth:`finish` in the
    same order; a worker without a unit in the last round calls only :meth:`finish`.
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
        self._sums: list[Tensor | None] = [None] * len(self.buckets)
        self._sent: deque[_Sent] = deque()
        self._ready = [0] * len(self.buckets)

    def begin(self) -> None:
        """Start a round, before the backward pass of this worker's unit; its gradients are sent as they appear."""
        self._active = (
            min(self.world, self.num_units - self._round * self.world) if self.by_unit else self.world
        )
        self._is_open, self._next, self._ready = True, 0, [0] * len(self.buckets)

    def end(self) -> None:
        """Send what the backward pass left, and add what the other workers sent; the parameters' gradients are None."""
        while self._next < len(self.buckets):
            self._send()
        while self._sent:
            self._add()
        self._round, self._is_open = self._round + 1, False

    def finish(self) -> None:
        """Complete the rounds of a step, and set every parameter's gradient to the sum over all units."""
        while self._round < self.rounds:
            self.begin()
            self.end()
        for bucket, own in zip(self.buckets, self._sums, strict=True):
            assert own is not None
            whole = own.new_empty(self.world * len(own))
            dist.all_gather_into_tensor(whole.view(torch.uint8), own.view(torch.uint8))
            bucket.unpack(whole.to(bucket.params[0].device))
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
        """Send the next bucket's parts to their owners, if this worker has a unit in this round."""
        bucket, number = self.buckets[self._next], self._next
        self._next += 1
        part = bucket.part(self.world)
        device = _exchange_device(bucket.params[0].device)
        sends = self.rank < self._active
        given = bucket.pack(part * self.world, device) if sends else bucket.empty(0, device)
        found = bucket.empty(part * self._active, device)
        size = part * found.element_size()
        work = dist.all_to_all_single(
            found.view(torch.uint8),
            given.view(torch.uint8),
            [size * (rank < self._active) for rank in range(self.world)],
            [size * sends] * self.world,
            async_op=True,
        )
        self._sent.append(_Sent(number, work, found, given))
        if len(self._sent) > IN_FLIGHT:
            self._add()

    def _add(self) -> None:
        """Wait for the oldest bucket that was sent, and add its units to the sum in their order."""
        number, work, found, _ = self._sent.popleft()
        work.wait()
        for unit in found.view(self._active, -1):
            own = self._sums[number]
            self._sums[number] = unit.clone() if own is None else own.add_(unit)


class _Sent(NamedTuple):
    """A bucket on its way; ``given`` is kept until it has been sent."""

    number: int
    work: Any
    found: Tensor
    given: Tensor


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
