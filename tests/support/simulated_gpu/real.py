"""The cases of the simulated GPU on a real one: the same questions, answered by torch's own CUDA."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

WAITED = "synchronizing CUDA operation"  # of torch's warning in sync debug mode


class RealGpu:
    """A real GPU behind the interface of the compiled module that simulates one."""

    def usage(self, device: int) -> tuple[int, int]:
        """Return the bytes of tensors on a device, and of the memory reserved for them; cuBLAS's own are freed."""
        gc.collect()
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)

    def limit_of(self, device: int) -> float:
        """Return the limit of a device's memory for this process in bytes."""
        return torch.cuda.get_per_process_memory_fraction(device) * self.memory(device)

    def memory(self, device: int = 0) -> int:
        """Return a device's memory in bytes."""
        return torch.cuda.get_device_properties(device).total_memory

    def has_context(self, device: int) -> bool:
        """Return whether tensors of this process are on a device."""
        return device < torch.cuda.device_count() and torch.cuda.memory_reserved(device) > 0

    @contextmanager
    def recording(self, record: Callable[[str, str, int], None]) -> Iterator[None]:
        """Call ``record`` for every operation in this context that makes the host wait for the GPU."""
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            shown = warnings.showwarning

            def show(message: Warning | str, *rest: object) -> None:
                if WAITED in str(message):
                    record("wait", "CUDA", 0)
                else:
                    shown(message, *rest)  # type: ignore[arg-type]

            warnings.showwarning = show
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)
