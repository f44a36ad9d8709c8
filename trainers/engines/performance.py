"""Options that change how fast a step is and nothing else, and a question to all ranks that no step waits for."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.config.engine import EngineConfig

#: Classes of the blocks that a U-Net is made of, many of each alike: compiled one by one, a kind compiles once.
BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")


def speed_up(unet: nn.Module | None, config: EngineConfig, device: torch.device) -> None:
    """Apply the ``engine:`` section's options to the process and the U-Net (None: a method without one).

    Modules are changed in place, so parameters, their names and what is saved stay as they are. Raises RecipeError for
    options that ZeRO's stage cannot have.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
        torch.backends.cudnn.allow_tf32 = config.allow_tf32
        torch.backends.cudnn.benchmark = config.cudnn_benchmark
    if config.channels_last and config.zero_stage not in ("auto", 0):
        raise RecipeError(
            f"engine.channels_last does not go with engine.zero_stage: {config.zero_stage}, which lays the weights end "
            "to end; set channels_last: false"
        )
    if config.torch_compile and config.zero_stage == 3:
        raise RecipeError(
            "engine.torch_compile does not go with engine.zero_stage: 3, whose weights come and go between the blocks; "
            "set torch_compile: false"
        )
    if unet is None:
        return
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not annotated
    if config.torch_compile:
        for module in unet.modules():
            if type(module).__name__ in BLOCKS:
                module.compile(backend=config.dynamo_backend)


def forget_compiled(config: EngineConfig) -> None:
    """Let go of compiled blocks: torch's caches would keep the model for the rest of the process."""
    if config.torch_compile:
        torch._dynamo.reset()


def ask_all(flag: bool, device: torch.device) -> Callable[[], bool]:
    """Start asking whether any rank raised the flag; the result tells, waiting for the answer but not for later work.

    On a GPU the answer is copied by a stream of its own: to read it from the training stream would wait for the step
    queued meanwhile.
    """
    asked = torch.full((), int(flag), device=device)
    work = dist.all_reduce(asked, op=dist.ReduceOp.MAX, async_op=True)
    if device.type != "cuda":

        def answer() -> bool:
            work.wait()
            return bool(asked.item())

        return answer
    stream, told = torch.cuda.Stream(device), torch.empty((), dtype=asked.dtype, pin_memory=True)
    with torch.cuda.stream(stream):
        work.wait()
        told.copy_(asked, non_blocking=True)
        asked.record_stream(stream)
        copied = stream.record_event()

    def answer_copied() -> bool:
        copied.synchronize()
        return bool(told.item())

    return answer_copied
