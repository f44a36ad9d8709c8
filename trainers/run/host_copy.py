"""Copies the state of a training into host memory, so that the training continues while the copy is written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class HostCopy:
    """Copies nested dicts, lists and tuples with tensors into buffers in host memory that are used again.

    The buffers are allocated by the first copy, and again where a tensor's shape or dtype changes. Those of a GPU's
    tensors are page-locked, and their copies are queued behind the computation: the host does not wait for them, and
    the GPU changes the tensors only afterwards.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._events: list[Any] = []

    @torch.no_grad()
    def take(self, state: Any) -> Any:
        """Return a copy of ``state`` whose tensors are in host memory, complete after :meth:`wait`.

        The copy is overwritten by the next one.
        """
        self._events = []
        devices: set[torch.device] = set()
        copy = self._take(state, "", devices)
        for device in devices:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._events.append(event)
        return copy

    def wait(self) -> None:
        """Wait until the last copy is complete; may be called by another thread."""
        for event in self._events:
            event.synchronize()

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _take(self, value: Any, name: str, devices: set[torch.device]) -> Any:
        if isinstance(value, Tensor):
            is_cuda = value.device.type == "cuda"
            if is_cuda:
                devices.add(value.device)
            return self._buffer(value, name).copy_(value, non_blocking=is_cuda)
        if isinstance(value, dict):
            return {key: self._take(inner, f"{name}.{key}", devices) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([self._take(inner, f"{name}.{n}", devices) for n, inner in enumerate(value)])
        return value

    def _buffer(self, tensor: Tensor, name: str) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            self._buffers[name] = buffer = _allocate(tensor)
        return buffer


def _allocate(tensor: Tensor) -> Tensor:
    """Return an empty tensor in host memory with the layout of another, so that a copy moves it as one block."""
    make: Callable[..., Tensor] = torch.empty_like
    if tensor.device.type == "cuda":
        try:
            return make(tensor, device="cpu", pin_memory=True)
        except RuntimeError as error:  # for example a limit on locked memory
            log.debug("no page-locked memory: %s", error)
    return make(tensor, device="cpu")
