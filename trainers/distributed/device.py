"""The device that work runs on: its choice, asynchronous copies to it, and out-of-memory errors."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dreamfleet.datasets.errors import ResourceError

#: Settings that need less GPU memory, by the work that ran out of it.
TRAINING = (
    "train.gradient_checkpointing: true; train.mixed_precision: bf16; a smaller train.train_batch_size with more "
    "train.gradient_accumulation_steps; engine.zero_stage: 2 with engine.offload_optimizer_device: cpu; "
    "engine.zero_stage: 3. Continue from the last checkpoint with --resume"
)
DRAWING = (
    "a smaller width and height; fewer images per prompt (at most 4 are generated at once); a GPU that no other "
    "program uses; or CUDA_VISIBLE_DEVICES= (empty), which runs on the CPU"
)
ENCODING = (
    "a smaller data.resolution; a GPU that no other program uses; or scaling.use_gpu: false, which encodes on CPUs. "
    "Encoded images are kept: run the same command again to continue"
)
# Libraries below torch report a failed allocation as a plain RuntimeError.
_OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def best_device() -> torch.device:
    """Return the current GPU, or the CPU on a machine without GPUs."""
    return with_index("cuda" if torch.cuda.is_available() else "cpu")


def with_index(device: torch.device | str) -> torch.device:
    """Return ``device`` with its index, because several functions of torch reject a plain ``cuda``."""
    device = torch.device(device)
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def copy_to_device(value: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device; to a GPU through page-locked memory, so that the host does not wait."""
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.contiguous().pin_memory()  # an expanded tensor cannot be page-locked as it is
    return value.to(device, non_blocking=True)


@contextmanager
def on_device(device: torch.device | str | None = None, *, remedies: str) -> Iterator[torch.device]:
    """Run work on ``device`` (None: :func:`best_device`), which is yielded with its index.

    On a GPU: it is the current device within this context, an out-of-memory error is explained with ``remedies``, and
    afterwards cached memory is released and the memory limit removed. On any device, local variables of an error's
    frames are cleared, so that they keep no tensors. Raises ResourceError if the GPU does not exist.
    """
    device = best_device() if device is None else with_index(device)
    if device.type != "cuda":
        try:
            yield device
        except BaseException as error:
            _forget_frames(error)
            raise
        return
    if device.index >= (count := torch.cuda.device_count()):
        raise ResourceError(
            f"{device}: this machine has {count or 'no'} GPUs that torch can use; set scaling.use_gpu: false"
        )
    _release_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with explain_out_of_memory(remedies), torch.cuda.device(device):
            yield device
    except BaseException as error:
        _forget_frames(error)
        raise
    finally:
        _release_memory(device)


@contextmanager
def explain_out_of_memory(remedies: str = TRAINING) -> Iterator[None]:
    """Turn an out-of-memory error of a GPU into a ResourceError that names settings that need less."""
    try:
        yield
    except RuntimeError as error:
        first = (str(error).strip().splitlines() or [""])[0]
        if not isinstance(error, torch.OutOfMemoryError) and not any(
            text in first for text in _OUT_OF_MEMORY
        ):
            raise
        _forget_frames(error)
        raise ResourceError(
            f"the GPU ran out of memory ({first}); to need less, in this order: {remedies}"
        ) from error


def _release_memory(device: torch.device) -> None:
    """Release unused memory, also for other processes, and remove the memory limit of an earlier run."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0, device)


def _forget_frames(error: BaseException | None) -> None:
    """Clear the local variables of an error's frames, which would keep the model on the GPU."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
