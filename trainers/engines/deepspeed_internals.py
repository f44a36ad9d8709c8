"""All uses of undocumented attributes of DeepSpeed 0.19, each in one function.

DeepSpeed keeps full-precision weights, optimizer states and gradients in flat tensors with its own layout, and writes
one checkpoint file per rank. dreamfleet instead saves plain tensors by parameter name, so that a run can be resumed
with any engine and any number of workers; this requires access to the flat tensors.
``tests/trainers/engines/test_deepspeed_internals.py`` checks :data:`INTERNALS` against the installed version.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dreamfleet.trainers.distributed.internals import Internal

_STAGE_2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_STAGE_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
_SCALER = "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler"
_PARAMETER = "deepspeed.runtime.zero.partition_parameters:Init"
_ACCELERATOR = "deepspeed.accelerator.abstract_accelerator:DeepSpeedAccelerator"
_BUILDER = "deepspeed.ops.op_builder.builder:OpBuilder"


INTERNALS = (
    Internal(_STAGE_2, "single_partition_of_fp32_groups"),
    Internal(_STAGE_2, "update_lp_params", ()),
    Internal(_STAGE_2, "micro_step_id"),
    Internal(_STAGE_2, "averaged_gradients"),
    Internal(_STAGE_2, "all_grad_tensors"),
    Internal(_STAGE_2, "reset_cpu_buffers", ()),
    Internal(_STAGE_2, "zero_grad", ("set_to_none",)),
    Internal(_STAGE_2, "loss_scaler"),
    Internal(_STAGE_3, "fp32_partitioned_groups_flat"),
    Internal(_STAGE_3, "_fp32_state_allgather", ("param", "fp32_state_partition")),
    Internal(_STAGE_3, "grad_position"),
    Internal(_STAGE_3, "get_param_id", ("param",)),
    Internal(_STAGE_3, "_reassign_or_swap_out_partitioned_parameters", ("sub_group_id",)),
    Internal(_STAGE_3, "persistent_parameters"),
    Internal(_STAGE_3, "reset_cpu_buffers", ()),
    Internal(_STAGE_3, "zero_grad", ("set_to_none",)),
    Internal(_STAGE_3, "loss_scaler"),
    Internal(_STAGE_3, "_swappable_optimizer_subgroup", ("sub_group_id",)),
    Internal(_STAGE_3, "_optimizer_states_and_gradient_swap_in", ("sub_group_id", "timer_names")),
    Internal(_STAGE_3, "_optimizer_states_and_gradient_swap_out", ("sub_group_id", "timer_names")),
    Internal(_STAGE_3, "_release_swap_buffers", ("sub_group_id",)),
    Internal(_PARAMETER, "partition"),
    Internal(_PARAMETER, "all_gather"),
    Internal(_ENGINE, "optimizer"),
    Internal(_ENGINE, "global_rank"),
    Internal(_ENGINE, "torch_autocast_z0_gradscaler"),
    Internal(_SCALER, "cur_iter"),
    Internal(_SCALER, "cur_scale"),
    Internal(_SCALER, "last_overflow_iter"),
    Internal(_SCALER, "scale_window"),
    Internal(_BUILDER, "cxx_args", ()),
    Internal(_ACCELERATOR, "available_memory", ("device_index",)),
    Internal("deepspeed:ops", "__compatible_ops__"),
)


def zero_optimizer(engine: Any) -> Any:
    """Return the ZeRO optimizer, which wraps the optimizer that was passed to ``deepspeed.initialize``."""
    return engine.optimizer


def rank_of(engine: Any) -> int:
    """Return the global rank of this process in DeepSpeed."""
    return int(engine.global_rank)


def fp32_partitions(optimizer: Any, *, stage: int) -> Sequence[Tensor]:
    """Return this rank's partition of the float32 weights, one flat tensor per group; ``stage`` is 1, 2 or 3."""
    parts: Sequence[Tensor] = (
        optimizer.single_partition_of_fp32_groups if stage < 3 else optimizer.fp32_partitioned_groups_flat
    )
    return parts


def gather_fp32(optimizer: Any, param: nn.Parameter, part: Tensor) -> Tensor:
    """Return a parameter's unsharded float32 weights (stage 3), given this rank's ``part`` of them.

    DeepSpeed's documented function does not read weights that are swapped to NVMe.
    """
    whole: Tensor = optimizer._fp32_state_allgather(param, part)
    return whole


def partition_position(optimizer: Any, param: nn.Parameter) -> tuple[int, int, int]:
    """Return the position of this rank's part of a parameter (stage 3): index of the flat tensor, start, length."""
    number, start, length = optimizer.grad_position[optimizer.get_param_id(param)]
    return number, start, int(length)


def publish_partition(optimizer: Any, number: int) -> None:
    """Copy flat tensor ``number`` of the float32 weights into the model's (half-precision) weights (stage 3)."""
    optimizer._reassign_or_swap_out_partitioned_parameters(number)


def publish_persistent(optimizer: Any) -> None:
    """Update the small parameters that stage 3 keeps unsharded on every rank, after their partitions changed."""
    if small := optimizer.persistent_parameters:
        small[0].partition(small)
        small[0].all_gather(small)


def publish_all(optimizer: Any) -> None:
    """Copy the float32 weights into the model's (half-precision) weights (stages 1 and 2)."""
    optimizer.update_lp_params()


def discard_gradients(optimizer: Any, *, stage: int, offloads: bool) -> None:
    """Discard accumulated gradients, as DeepSpeed does after an fp16 overflow. ``offloads``: to host memory."""
    optimizer.zero_grad()
    if stage < 3:
        optimizer.micro_step_id = (
            -1
        )  # the next micro-batch overwrites the gradients instead of adding to them
        for gradients in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))
    if offloads:
        optimizer.reset_cpu_buffers()


def grad_scaler(engine: Any) -> Any:
    """Return the torch.amp.GradScaler that stage 0 uses for fp16; None without fp16."""
    return engine.torch_autocast_z0_gradscaler


def read_loss_scale(optimizer: Any) -> tuple[float, int, int]:
    """Return the fp16 loss scale of stages 1 to 3, the steps since the last overflow, and the growth interval."""
    scaler = optimizer.loss_scaler
    return float(scaler.cur_scale), scaler.cur_iter - scaler.last_overflow_iter - 1, scaler.scale_window


def write_loss_scale(optimizer: Any, scale: float, *, since_overflow: int) -> None:
    """Set the fp16 loss scale of stages 1 to 3 and the number of steps since the last overflow."""
    scaler = optimizer.loss_scaler
    scaler.cur_scale = scale
    scaler.last_overflow_iter = scaler.cur_iter - 1 - since_overflow


def is_swapped(optimizer: Any, number: int) -> bool:
    """Return whether the weights and moments of a flat tensor are in files; those under 1 MB stay in memory."""
    return bool(optimizer._swappable_optimizer_subgroup(number))


def swap_in(optimizer: Any, number: int) -> None:
    """Read the weights and moments of a flat tensor from their files into memory."""
    optimizer._optimizer_states_and_gradient_swap_in(number)


def swap_out(optimizer: Any, number: int, *, changed: bool) -> None:
    """Release the memory that :func:`swap_in` allocated; write it back to the files if it was ``changed``."""
    if changed:
        optimizer._optimizer_states_and_gradient_swap_out(number)
    else:
        optimizer._release_swap_buffers(number)


@contextmanager
def flattens_on_host() -> Iterator[None]:
    """Make stages 1 and 2 flatten the weights in host memory, so that a GPU never holds them twice.

    DeepSpeed flattens them on the GPU if its free memory suffices, which ignores the limit of this process.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.available_memory = lambda device_index=None: 0
    try:
        yield
    finally:
        del accelerator.available_memory


def build_without_debug_symbols(builder: Any) -> None:
    """Make a DeepSpeed op builder compile without debug symbols, which take half of the compile time."""
    flags = builder.cxx_args
    builder.cxx_args = lambda: [flag for flag in flags() if flag != "-g"]


def skip_op_probing(deepspeed: Any) -> None:
    """Make DeepSpeed skip its compiled ops for inference, one of which it would compile for gloo, taking a minute."""
    deepspeed.ops.__compatible_ops__ = {}
