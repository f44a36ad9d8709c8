"""Broadcasts nested data with tensors: the structure as a Python object, and the tensors in few large messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dreamfleet.trainers.distributed.context import DistributedContext

BYTES_AT_ONCE = 2**26  # of one message


@dataclass(frozen=True)
class _Slot:
    """The place of a tensor in the structure."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    on_device: bool

    @property
    def num_bytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def broadcast_tree(tree: Any, *, source: int, distributed: DistributedContext) -> Any:
    """Return rank ``source``'s nested dicts, lists and tuples of tensors and plain values on every rank.

    Tensors are returned contiguous: those that ``source`` has on its device on this rank's device, the others on the
    CPU. ``source`` gets its own tree back. Every rank calls this; the other ranks' ``tree`` is ignored.
    """
    if distributed.world == 1:
        return tree
    holds = distributed.rank == source
    tensors: list[Tensor] = []
    packed = [_take_out(tree, tensors) if holds else None]
    dist.broadcast_object_list(packed, src=source, group=distributed.group)
    slots = list(_slots(packed[0]))
    found: dict[int, Tensor] = {}
    for kind in sorted({(slot.on_device, str(slot.dtype)) for slot in slots}):
        chunk: list[_Slot] = []
        for slot in (one for one in slots if (one.on_device, str(one.dtype)) == kind):
            if chunk and sum(one.num_bytes for one in chunk) + slot.num_bytes > BYTES_AT_ONCE:
                found |= _broadcast(chunk, tensors, source=source, distributed=distributed)
                chunk = []
            chunk.append(slot)
        found |= _broadcast(chunk, tensors, source=source, distributed=distributed)
    return tree if holds else _put_back(packed[0], found)


def _broadcast(
    chunk: list[_Slot], tensors: list[Tensor], *, source: int, distributed: DistributedContext
) -> dict[int, Tensor]:
    """Broadcast tensors of one type as one flat message; return them by number on the other ranks."""
    device = distributed.device if chunk[0].on_device else torch.device("cpu")
    group = None if chunk[0].on_device and device.type != "cpu" else distributed.group
    sizes = [int(torch.Size(slot.shape).numel()) for slot in chunk]
    if distributed.rank == source:
        flat = torch.cat([tensors[slot.number].detach().reshape(-1) for slot in chunk])
    else:
        flat = torch.empty(sum(sizes), dtype=chunk[0].dtype, device=device)
    if flat.numel():
        dist.broadcast(flat.view(torch.uint8), src=source, group=group)
    if distributed.rank == source:
        return {}
    parts = flat.split(sizes)
    return {slot.number: part.view(slot.shape).clone() for slot, part in zip(chunk, parts, strict=True)}


def _take_out(tree: Any, tensors: list[Tensor]) -> Any:
    """Return a tree with slots in place of its tensors, which are appended to ``tensors``."""
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return _Slot(len(tensors) - 1, tuple(tree.shape), tree.dtype, tree.device.type != "cpu")
    if isinstance(tree, dict):
        return {key: _take_out(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_take_out(value, tensors) for value in tree)
    return tree


def _put_back(tree: Any, found: dict[int, Tensor]) -> Any:
    if isinstance(tree, _Slot):
        return found[tree.number]
    if isinstance(tree, dict):
        return {key: _put_back(value, found) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_put_back(value, found) for value in tree)
    return tree


def _slots(tree: Any) -> Iterator[_Slot]:
    if isinstance(tree, _Slot):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _slots(value)
