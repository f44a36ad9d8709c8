"""Sets up DeepSpeed: its JSON configuration, an import that does not write to stdout, and its compiled CPU Adam."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock

from dreamfleet.datasets.errors import ResourceError
from dreamfleet.trainers.config.deepspeed import (
    BUCKET,
    SWAPPED_GROUP,
    merge_trees,
    passed_on,
    read_deepspeed_file,
)
from dreamfleet.trainers.config.engine import ZERO_KEYS, EngineConfig
from dreamfleet.trainers.engines import deepspeed_internals as internals

log = logging.getLogger(__name__)


def zero_config(
    config: EngineConfig,
    *,
    mixed_precision: str,
    max_grad_norm: float,
    num_micros: int,
    num_params: int,
    largest: int = 0,
    swap_folder: str | None = None,
) -> dict[str, Any]:
    """Return DeepSpeed's JSON configuration for an ``engine:`` section.

    ``num_params``: number of trainable elements. ``largest``: number of elements in the largest tensor.
    ``swap_folder``: this process's folder on an NVMe disk.

    Stages 1 to 3 use DeepSpeed's half-precision modes: 16-bit weights and gradients, and float32 weights in the sharded
    optimizer. Stage 0 has no sharded optimizer and uses float32 weights under autocast, like TorchEngine. Other keys of
    the ``deepspeed_config`` file are passed on; the recipe's keys take precedence.
    Source: https://www.deepspeed.ai/docs/config-json/
    """
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage:
        bucket = min(BUCKET, num_params + num_params % 2)  # DeepSpeed rejects odd sizes
        zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    zero |= {key: getattr(config, key) for key in ZERO_KEYS if getattr(config, key) is not None}
    for part in ("optimizer", "param"):
        device = getattr(config, f"offload_{part}_device")
        if device != "none":
            block: dict[str, Any] = {"device": device}
            block |= {} if config.pin_memory is None else {"pin_memory": config.pin_memory}
            block |= {"nvme_path": swap_folder} if device == "nvme" else {}
            zero[f"offload_{part}"] = block
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # used only in a DeepSpeed log message that is disabled
        "gradient_accumulation_steps": num_micros,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
    }
    if mixed_precision == "fp16" and config.zero_stage:  # with the loss scale of torch's GradScaler
        settings["fp16"] = {
            "enabled": True,
            "initial_scale_power": 16,
            "loss_scale_window": 2000,
            "hysteresis": 1,
        }
    elif mixed_precision == "fp16":
        settings["torch_autocast"] = {"enabled": True, "dtype": "float16"}
    elif mixed_precision == "bf16" and config.zero_stage:
        settings["bf16"] = {"enabled": True}
    defaults: dict[str, Any] = {}
    if config.offload_optimizer_device == "nvme":
        defaults = {"sub_group_size": SWAPPED_GROUP}
    if config.offload_param_device == "nvme":  # DeepSpeed's default keeps a billion weights in host memory
        defaults |= {"offload_param": {"max_in_cpu": 0, "buffer_size": largest}}
    under: dict[str, Any] = {"zero_optimization": defaults}
    if config.deepspeed_config is not None:
        under = merge_trees(under, passed_on(read_deepspeed_file(config.deepspeed_config)))
    return merge_trees(under, settings)


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a device and redirect its log to this program's. Raises ResourceError if that fails."""
    # DeepSpeed reads this variable once, at import. Without it, a run on the CPU of a machine with a GPU uses the GPU.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # DeepSpeed takes the device index from LOCAL_RANK.
    os.environ["LOCAL_RANK"] = (
        str(device.index or 0) if device.type == "cuda" else os.environ.get("LOCAL_RANK", "0")
    )
    try:
        with stdout_to_stderr():
            import deepspeed
    except ImportError as error:
        raise ResourceError(
            f"engine.zero_stage needs DeepSpeed, which cannot be imported here ({error}): install it with "
            "pip install --no-build-isolation deepspeed, or set engine.zero_stage: auto"
        ) from error
    # DeepSpeed calls torch functions by deprecated names at every gather.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    own = logging.getLogger("DeepSpeed")
    own.handlers.clear()  # they write to stdout, which is reserved for results
    own.propagate = True
    internals.skip_op_probing(deepspeed)
    return deepspeed


def destroy_group() -> None:
    """Destroy the default process group, and DeepSpeed's reference to it."""
    import deepspeed

    (deepspeed.comm if deepspeed.comm.is_initialized() else dist).destroy_process_group()


def make_cpu_adam(plain: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return DeepSpeed's CPU AdamW for offloaded states, with the groups and settings of the optimizer ``plain``.

    The first call on a machine compiles it into TORCH_EXTENSIONS_DIR or ``~/.cache/torch_extensions``, which takes
    minutes. Raises ResourceError if it cannot be compiled.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder

    build_op(
        CPUAdamBuilder(),
        what="engine.offload_optimizer_device compiles DeepSpeed's CPU Adam",
        needs="a C++ compiler and ninja (apt-get install g++ python3-dev; pip install ninja)",
        instead="engine.offload_optimizer_device: none",
    )
    groups = [{key: group[key] for key in ("params", "name")} for group in plain.param_groups]
    options = {key: plain.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
    return DeepSpeedCPUAdam(groups, **options, adamw_mode=True)


def build_op(builder: Any, *, what: str, needs: str, instead: str) -> None:
    """Load a DeepSpeed op, compiling it if necessary.

    Raises ResourceError if that fails; ``what``, ``needs`` and ``instead`` are parts of the message.
    """
    internals.build_without_debug_symbols(builder)
    try:
        with sole_builder(builder.NAME), stdout_to_stderr():
            builder.load(verbose=False)
    except Exception as error:  # builders raise many types, such as a TypeError without CUDA_HOME
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ResourceError(
            f"{what} at its first use, which failed ({reason}); every machine needs {needs}, or set {instead}"
        ) from error


@contextmanager
def sole_builder(op: str) -> Iterator[None]:
    """Hold a lock while a compiled op is built and loaded, and remove the lock file that a killed build left.

    torch marks a build in progress by a file, and waits forever if the building process was killed. The lock used here
    is released when its process ends, so whoever holds it knows that torch's file is stale.
    """
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(op, verbose=False))
    with FileLock(folder / "dreamfleet.lock", fallback_to_soft=False):
        (folder / "lock").unlink(missing_ok=True)
        if not (folder / f"{op}.so").exists():
            log.warning("compiling DeepSpeed's %s, once on this machine: some minutes", op)
        yield


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Redirect stdout of this process and of compilers that it starts to stderr, since stdout carries results."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
