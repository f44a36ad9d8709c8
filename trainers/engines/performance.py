"""Options that change the speed of a step but not its result, and a flag shared by all ranks without waiting."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from dreamfleet.trainers.config.engine import EngineConfig
from dreamfleet.trainers.models.family import DiffusionModel


def apply_options(model: DiffusionModel, config: EngineConfig, device: torch.device) -> None:
    """Apply the ``engine:`` section's performance options to this process and the model's denoiser, if it is loaded.

    Modules are changed in place, so parameters, their names and checkpoints stay as they are.
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
    """Clear torch's caches of compiled blocks, which would keep the model until the process ends."""
    if config.torch_compile:
        torch._dynamo.reset()


def start_any_rank(flag: bool, device: torch.device) -> Callable[[], bool]:
    """Start an all-reduce over the ranks' flags; the function returned waits for it, but not for later work.

    On a GPU a stream of its own copies the answer: reading it from the training stream would wait for the step that has
    been queued in the meantime.
    """
    flags = torch.full((), int(flag), device=device)
    work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, async_op=True)
    if device.type != "cuda":

        def answer() -> bool:
            work.wait()
            return bool(flags.item())

        return answer
    stream, on_host = torch.cuda.Stream(device), torch.empty((), dtype=flags.dtype, pin_memory=True)
    with torch.cuda.stream(stream):
        work.wait()
        on_host.copy_(flags, non_blocking=True)
        flags.record_stream(stream)
        copied = stream.record_event()

    def answer_copied() -> bool:
        copied.synchronize()
        return bool(on_host.item())

    return answer_copied
