"""What is used of DeepSpeed 0.19 beyond its documented interface: each name once, with the reason.

DeepSpeed keeps full-precision weights, optimizer states and gradients in flat tensors of its own layout, and its
checkpoint files have one part per rank. A run of dreamfleet saves plain tensors by parameter name instead, so that any
engine and any number of workers can resume it; that takes access to the flat tensors. ``tests/trainers/engines/
test_deepspeed_internals.py`` checks every entry of :data:`INTERNALS` against the installed version.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

_STAGE_2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_STAGE_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
_SCALER = "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler"
_PARAMETER = "deepspeed.runtime.zero.partition_parameters:Init"
_BUILDER = "deepspeed.ops.op_builder.builder:OpBuilder"


class Internal(NamedTuple):
    """An attribute of a class of DeepSpeed's; for a method also its parameters after ``self``."""

    owner: str  # "module:class"
    name: str
    parameters: tuple[str, ...] | None = None


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
    Internal("deepspeed:ops", "__compatible_ops__"),
)


def zero_optimizer(engine: Any) -> Any:
    """Return the optimizer that shards, which wraps the one that was handed to ``deepspeed.initialize``."""
    return engine.optimizer


def rank_of(engine: Any) -> int:
    """Return the rank that DeepSpeed takes this process for."""
    return int(engine.global_rank)


def fp32_partitions(optimizer: Any, *, stage: int) -> Sequence[Tensor]:
    """Return this rank's part of the full-precision weights, one flat tensor per group; ``stage`` is 1, 2 or 3."""
    parts: Sequence[Tensor] = (
        optimizer.single_partition_of_fp32_groups if stage < 3 else optimizer.fp32_partitioned_groups_flat
    )
    return parts


def gather_fp32(optimizer: Any, param: nn.Parameter, part: Tensor) -> Tensor:
    """Return a parameter's full-precision weights unsharded (stage 3); the documented way reads no swapped ones."""
    whole: Tensor = optimizer._fp32_state_allgather(param, part)
    return whole


def partition_position(optimizer: Any, param: nn.Parameter) -> tuple[int, int, int]:
    """Return where this rank's part of a parameter is (stage 3): number of the flat tensor, start and length."""
    number, start, length = optimizer.grad_position[optimizer.get_param_id(param)]
    return number, start, int(length)


def publish_partition(optimizer: Any, number: int) -> None:
    """Copy a flat tensor of full-precision weights into the weights that the model computes with (stage 3)."""
    optimizer._reassign_or_swap_out_partitioned_parameters(number)


def publish_persistent(optimizer: Any) -> None:
    """Gather the small parameters that stage 3 keeps unsharded on every rank, after their partitions changed."""
    if small := optimizer.persistent_parameters:
        small[0].partition(small)
        small[0].all_gather(small)


def publish_all(optimizer: Any) -> None:
    """Copy the full-precision weights into the weights that the model computes with (stages 1 and 2)."""
    optimizer.update_lp_params()


def discard_gradients(optimizer: Any, *, stage: int, offloads: bool) -> None:
    """Discard accumulated gradients, as DeepSpeed itself does after a step that overflowed."""
    optimizer.zero_grad()
    if stage < 3:
        optimizer.micro_step_id = -1  # decides whether the next micro-batch is added or copied
        for gradients in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))
    if offloads:
        optimizer.reset_cpu_buffers()


def grad_scaler(engine: Any) -> Any:
    """Return the torch.amp.GradScaler of stage 0 under fp16, else None."""
    return engine.torch_autocast_z0_gradscaler


def read_loss_scale(optimizer: Any) -> tuple[float, int, int]:
    """Return the fp16 loss scale of stages 1 to 3, the steps since an overflow, and after how many it grows."""
    scaler = optimizer.loss_scaler
    return float(scaler.cur_scale), scaler.cur_iter - scaler.last_overflow_iter - 1, scaler.scale_window


def write_loss_scale(optimizer: Any, scale: float, *, since_overflow: int) -> None:
    """Set the fp16 loss scale of stages 1 to 3 and the steps since an overflow."""
    scaler = optimizer.loss_scaler
    scaler.cur_scale = scale
    scaler.last_overflow_iter = scaler.cur_iter - 1 - since_overflow


def is_swapped(optimizer: Any, number: int) -> bool:
    """Return whether a flat tensor's weights and moments are in files; those under a megabyte stay in memory."""
    return bool(optimizer._swappable_optimizer_subgroup(number))


def swap_in(optimizer: Any, number: int) -> None:
    """Read a flat tensor's weights and moments from their files."""
    optimizer._optimizer_states_and_gradient_swap_in(number)


def swap_out(optimizer: Any, number: int, *, changed: bool) -> None:
    """Release what :func:`swap_in` read, writing it to the files if it was ``changed``."""
    if changed:
        optimizer._optimizer_states_and_gradient_swap_out(number)
    else:
        optimizer._release_swap_buffers(number)


def build_without_debug_symbols(builder: Any) -> None:
    """Make an op's builder compile without debugging symbols, which take half of the compiler's time."""
    flags = builder.cxx_args
    builder.cxx_args = lambda: [flag for flag in flags() if flag != "-g"]


def skip_op_probing(deepspeed: Any) -> None:
    """Make DeepSpeed believe that no op is available: for gloo it would compile one, a minute long, for inference."""
    deepspeed.ops.__compatible_ops__ = {}
