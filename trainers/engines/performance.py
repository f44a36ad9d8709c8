"""Performance options of the ``engine:`` section, and an asynchronous reduction of a flag over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from dreamfleet.trainers.config.engine import EngineConfig
from dreamfleet.trainers.models.family import DiffusionModel


def apply_options(model: DiffusionModel, config: EngineConfig, device: torch.device) -> None:
    """Apply the performance options of the ``engine:`` section to this process and to the model's denoiser, if loaded.

    Modules are changed in place; parameters, parameter names and checkpoints are not affected.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
        torch.backends.cudnn.allow_tf32 = config.allow_tf32
        torch.backends.cudnn.benchmark = config.cudnn_benchmark
    denoiser = model.denoiser
    if denoiser is None:
        return
    if config.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    if config.torch_compile:
        for module in denoiser.modules():
            if type(module).__name__ in model.block_classes:
                module.compile(backend=config.dynamo_backend)


def release_compiled(config: EngineConfig) -> None:
    """Clear torch's caches of compiled blocks, which would otherwise keep the model in memory."""
    if config.torch_compile:
        torch._dynamo.reset()


def start_any_rank(flags: Sequence[bool], device: torch.device) -> Callable[[], tuple[bool, ...]]:
    """Start an all-reduce over the ranks' flags; return a function that waits for it and returns which any rank has.

    On a GPU the result is copied on a separate stream. Reading it on the training stream would also wait for the steps
    that were queued after it.
    """
    every = torch.tensor([int(flag) for flag in flags], device=device)
    work = dist.all_reduce(every, op=dist.ReduceOp.MAX, async_op=True)
    if device.type != "cuda":

        def answer() -> tuple[bool, ...]:
            work.wait()
            return tuple(map(bool, every.tolist()))

        return answer
    stream, on_host = torch.cuda.Stream(device), torch.empty_like(every, device="cpu", pin_memory=True)
    with torch.cuda.stream(stream):
        work.wait()
        on_host.copy_(every, non_blocking=True)
        every.record_stream(stream)
        copied = stream.record_event()

    def answer_copied() -> tuple[bool, ...]:
        copied.synchronize()
        return tuple(map(bool, on_host.tolist()))

    return answer_copied
