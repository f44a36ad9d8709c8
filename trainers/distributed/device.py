"""The device that work runs on: which one, copies to it that do not wait, and its memory, explained and given back."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dreamfleet.datasets.errors import ResourceError

#: What takes less memory of a GPU, by what was being done when there was too little.
TRAINING = (
    "train.gradient_checkpointing: true; train.mixed_precision: bf16; a smaller train.train_batch_size with more "
    "train.gradient_accumulation_steps; engine.zero_stage: 2 with engine.offload_optimizer_device: cpu; "
    "engine.zero_stage: 3. What is saved can be continued with --resume"
)
DRAWING = (
    "a smaller width and height; fewer images per prompt (at most 4 are drawn at once); a GPU that no other program "
    "uses; or CUDA_VISIBLE_DEVICES= (set to nothing), which draws on the CPU"
)
ENCODING = (
    "a smaller data.resolution; a GPU that no other program uses; or scaling.use_gpu: false, which encodes on CPUs. "
    "What is encoded is kept: the same command continues from there"
)
# Libraries below torch report a failed allocation as a plain RuntimeError.
_OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def best_device() -> torch.device:
    """Return the current GPU, or the CPU of a machine without one."""
    return with_index("cuda" if torch.cuda.is_available() else "cpu")


def with_index(device: torch.device | str) -> torch.device:
    """Return ``device`` with its number: several functions of torch refuse a bare ``cuda``."""
    device = torch.device(device)
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def copy_to_device(value: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device; to a GPU without making the host wait, which takes page-locked memory."""
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.contiguous().pin_memory()  # an expanded tensor cannot be page-locked as it is
    return value.to(device, non_blocking=True)


@contextmanager
def on_device(device: torch.device | str | None = None, *, remedies: str) -> Iterator[torch.device]:
    """Do a piece of work on ``device`` (None: :func:`best_device`), which is given with its number.

    On a GPU: it is the current one meanwhile, running out of its memory is explained by ``remedies``, and afterwards,
    whether the work succeeded or failed, the memory is given back and no limit stays. On any device, the frames of an
    error keep nothing alive. Raises ResourceError where there is no such GPU.
    """
    device = best_device() if device is None else with_index(device)
    if device.type != "cuda":
        try:
            yield device
        except BaseException as error:
            _forget_frames(error)
            raise
        return
    if device.index >= (there := torch.cuda.device_count()):
        raise ResourceError(
            f"{device}: this machine has {there or 'no'} GPUs that torch can use; set scaling.use_gpu: false"
        )
    _give_back(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with explain_out_of_memory(remedies), torch.cuda.device(device):
            yield device
    except BaseException as error:
        _forget_frames(error)
        raise
    finally:
        _give_back(device)


@contextmanager
def explain_out_of_memory(remedies: str = TRAINING) -> Iterator[None]:
    """Turn a GPU's running out of memory into a ResourceError that says what takes less."""
    try:
        yield
    except RuntimeError as error:
        first = (str(error).strip().splitlines() or [""])[0]
        if not isinstance(error, torch.OutOfMemoryError) and not any(
            told in first for told in _OUT_OF_MEMORY
        ):
            raise
        _forget_frames(error)
        raise ResourceError(
            f"the GPU ran out of memory ({first}); what takes less, in this order: {remedies}"
        ) from error


def _give_back(device: torch.device) -> None:
    """Free what nobody refers to any more, for other processes too, and lift the limit of an earlier run."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0, device)


def _forget_frames(error: BaseException | None) -> None:
    """Clear the local variables of the frames an error came through: they would keep the model on the GPU."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
