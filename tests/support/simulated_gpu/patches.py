"""Patches torch.cuda and torch.distributed for the simulated GPU, as in a CUDA build of torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

import simulated_gpu

cuda = torch.cuda


def apply(ext: Any, devices: int) -> None:
    """Patch torch's modules; ``ext`` is the compiled extension."""
    _patch_runtime(ext, devices)
    _patch_properties(ext, devices)
    _patch_streams(ext)
    _patch_storages(ext)
    _patch_tensor_types()
    if torch.distributed.is_available():
        _patch_distributed(ext)
    cuda.nvtx.range_push = lambda *_, **__: 0
    cuda.nvtx.range_pop = lambda *_, **__: 0


def _patch_runtime(ext: Any, devices: int) -> None:
    """Replace the functions of torch._C that a CPU build lacks."""
    total = ext.total()

    def wait(what: str, kind: str = "wait") -> None:
        ext.finish_copies()
        if ext.is_recording():
            simulated_gpu._record(kind, what, 0)

    def count() -> int:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return devices if visible is None else min(devices, len([one for one in visible.split(",") if one]))

    def stats(device: int) -> dict[str, Any]:
        now, peak = ext.usage(device)
        entry = {"current": now, "peak": peak, "allocated": peak, "freed": 0}
        kinds = {"all": entry, "small_pool": entry, "large_pool": entry}
        names = ("allocated_bytes", "reserved_bytes", "active_bytes", "inactive_split_bytes", "requested_bytes",
                 "allocation", "segment", "active", "inactive_split")  # fmt: skip
        return dict.fromkeys(names, kinds) | {"num_alloc_retries": 0, "num_ooms": 0}

    def free(device: int) -> tuple[int, int]:
        wait("mem_get_info", kind="slow call")
        number = ext.get_device() if device is None or device < 0 else device
        return total - ext.usage(number)[0] - simulated_gpu.CONTEXT, total

    def exchange(device: int) -> int:
        return ext.exchange_device(device)

    functions: dict[str, Callable[..., Any]] = {
        "_cuda_getDeviceCount": count,
        "_cuda_init": lambda: None,
        "_cuda_isInBadFork": lambda: False,
        "_cuda_setDevice": ext.set_device,
        "_cuda_getDevice": ext.get_device,
        "_cuda_exchangeDevice": exchange,
        "_cuda_maybeExchangeDevice": exchange,
        "_cuda_synchronize": lambda: wait("synchronize"),
        "_cuda_memoryStats": stats,
        "_cuda_emptyCache": lambda *_: wait("empty_cache"),
        "_cuda_resetPeakMemoryStats": ext.reset_peak,
        "_cuda_resetAccumulatedMemoryStats": lambda _: None,
        "_cuda_setMemoryFraction": lambda fraction, device: ext.limit(device, int(fraction * total)),
        "_cuda_getMemoryFraction": lambda device: ext.limit_of(device) / total,
        "_cuda_getArchFlags": lambda: "sm_90",
        "_cuda_getCompiledVersion": lambda: 12080,
        "_cuda_get_sync_debug_mode": lambda: 0,
        "_cuda_set_sync_debug_mode": lambda _: None,
        "_cuda_ipc_collect": lambda: None,
        "_cuda_getAllocatorBackend": lambda: "native",
        "_cuda_canDeviceAccessPeer": lambda _, __: True,
        "_cuda_hostMemoryStats": dict,
        "_cuda_getCurrentRawStream": lambda device: ext.stream(device)[0],
    }
    for name, function in functions.items():
        setattr(torch._C, name, function)
    cuda._cudart = SimpleNamespace(
        cudaMemGetInfo=free, cudaError=SimpleNamespace(success=0), cudaGetErrorString=str,
        cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0, cudaProfilerStart=lambda: 0,
        cudaProfilerStop=lambda: 0,
    )  # fmt: skip
    # torch.cuda chose these functions at its import. They must be different functions: dynamo registers them
    # by identity.
    cuda._exchange_device = lambda device: ext.exchange_device(device)
    cuda._maybe_exchange_device = lambda device: ext.exchange_device(device)
    cuda._device_count_nvml = lambda: -1
    cuda.default_generators = tuple(ext.default_generator(number) for number in range(devices))
    cuda._queued_calls.clear()


def _patch_properties(ext: Any, devices: int) -> None:
    properties = SimpleNamespace(
        name="Simulated GPU", total_memory=ext.total(), major=9, minor=0, multi_processor_count=132, warp_size=32,
        is_integrated=False, gcnArchName="", uuid="GPU-0", regs_per_multiprocessor=65536, L2_cache_size=50 * 2**20,
        max_threads_per_multi_processor=2048, shared_memory_per_block=49152,
        shared_memory_per_multiprocessor=233472, shared_memory_per_block_optin=232448,
    )  # fmt: skip

    def get_device_properties(device: Any = None) -> Any:
        cuda._lazy_init()
        number = cuda._utils._get_device_index(device, optional=True)
        if not 0 <= number < devices:
            raise AssertionError("Invalid device id")
        return properties

    cuda.get_device_properties = get_device_properties
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.get_arch_list = lambda: ["sm_90"]
    cuda.is_bf16_supported = lambda including_emulation=True: True


def _patch_streams(ext: Any) -> None:
    def number_of(device: Any) -> int:
        return cuda._utils._get_device_index(device, optional=True)

    class Stream(torch.Stream):
        """A stream of a simulated GPU."""

        def __new__(cls, device: Any = None, priority: int = 0, **known: Any) -> Any:
            if known:
                return super().__new__(cls, **known)
            return super().__new__(cls, device=torch.device("cuda", number_of(device)), priority=priority)

        @property
        def cuda_stream(self) -> int:
            return self.stream_id

        def record_event(self, event: Any = None) -> Any:
            event = Event() if event is None else event
            event.record(self)
            return event

    class Event(torch.Event):
        """An event of a simulated GPU."""

        def __new__(
            cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **_: Any
        ):
            return super().__new__(
                cls, device=torch.device("cuda", ext.get_device()), enable_timing=enable_timing
            )

        def __init__(self, enable_timing: bool = False, **_: Any):
            self.is_timed, self.recorded_at = enable_timing, None

        def record(self, stream: Any = None) -> None:
            super().record(current_stream() if stream is None else stream)
            self.recorded_at = time.perf_counter()

        def elapsed_time(self, end_event: Any) -> float:
            """Return the milliseconds between two events; torch.Event refuses its subclasses here."""
            if not self.is_timed or not end_event.is_timed:
                raise ValueError("Both events must be created with argument 'enable_timing=True'.")
            if self.recorded_at is None or end_event.recorded_at is None:
                raise ValueError("Both events must be recorded before calculating elapsed time.")
            return 1000 * (end_event.recorded_at - self.recorded_at)

    def current_stream(device: Any = None) -> Any:
        cuda._lazy_init()
        stream_id, number, kind = ext.stream(number_of(device))
        return Stream(stream_id=stream_id, device_index=number, device_type=kind)

    def set_stream(stream: Any) -> None:
        if stream is not None:
            ext.set_stream(stream.stream_id, stream.device_index)

    class StreamContext:
        """Context that makes a stream and its device current."""

        def __init__(self, stream: Any):
            self.stream = stream

        def __enter__(self) -> None:
            if self.stream is not None:
                self.before, self.device = current_stream(self.stream.device), ext.get_device()
                ext.set_device(self.stream.device_index)
                set_stream(self.stream)

        def __exit__(self, *_: Any) -> None:
            if self.stream is not None:
                set_stream(self.before)
                ext.set_device(self.device)

    cuda.Stream = cuda.streams.Stream = Stream
    cuda.Event = cuda.streams.Event = Event
    cuda.current_stream, cuda.set_stream = current_stream, set_stream
    cuda.default_stream = lambda device=None: Stream(
        stream_id=0, device_index=number_of(device), device_type=1
    )
    cuda.StreamContext = cuda.stream = StreamContext


def _patch_storages(ext: Any) -> None:
    """Move storages to the device through tensors, because torch's own code was compiled for CPUs only."""
    kind = torch.UntypedStorage
    clone, to = kind.clone, kind.to

    def bytes_of(storage: Any) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    def copied(storage: Any, device: Any) -> Any:
        other = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device).untyped_storage()
        if storage.nbytes():
            bytes_of(other).copy_(bytes_of(storage))
        return other

    def move(self: Any, *, device: Any, non_blocking: bool = False) -> Any:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", ext.get_device())
        if self.device == device:
            return self
        return (
            copied(self, device)
            if device.type == "cuda"
            else to(self, device=device, non_blocking=non_blocking)
        )

    kind.clone = lambda self: copied(self, self.device) if self.device.type == "cuda" else clone(self)
    kind.to = move
    kind.cuda = lambda self, device=None, non_blocking=False: move(self, device=device or "cuda")


def _patch_tensor_types() -> None:
    """Add torch.cuda.FloatTensor and similar types, which DeepSpeed still calls."""

    def maker(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
        def make(*given: Any) -> torch.Tensor:
            if len(given) == 1 and not isinstance(given[0], int):
                return torch.tensor(given[0], dtype=dtype, device="cuda")
            return torch.empty(given, dtype=dtype, device="cuda")

        return make

    for name, dtype in {
        "FloatTensor": torch.float32, "HalfTensor": torch.float16, "BFloat16Tensor": torch.bfloat16,
        "ByteTensor": torch.uint8, "LongTensor": torch.int64, "IntTensor": torch.int32, "DoubleTensor": torch.float64,
        "BoolTensor": torch.bool,
    }.items():  # fmt: skip
        setattr(cuda, name, maker(dtype))


def _patch_distributed(ext: Any) -> None:
    """Register ``nccl`` for CUDA tensors, and allow them for ``gloo``; both are implemented with Gloo on the CPU."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    class Options:
        def __init__(self, is_high_priority_stream: bool = False):
            self.is_high_priority_stream = is_high_priority_stream
            self._timeout = c10d.default_pg_timeout
            self.split_from, self.split_color = None, -1
            self.global_ranks_in_group: list[int] = []
            self.group_name = self.group_desc = ""
            self.config = SimpleNamespace()

    class Kind(type):
        def __instancecheck__(cls, one: Any) -> bool:
            return isinstance(one, ext.Collectives)

    class ProcessGroupNCCL(metaclass=Kind):
        """NCCL's process group, implemented with Gloo; allows one rank per device."""

        def __new__(cls, store: Any, rank: int, size: int, options: Any = None, timeout: Any = None) -> Any:
            ext.touch(ext.get_device())
            below = dist.PrefixStore("simulated", store)
            gloo = dist.ProcessGroupGloo(below, rank, size, c10d.default_pg_timeout)
            return ext.Collectives(gloo, rank, size, False)

    ProcessGroupNCCL.Options = Options  # type: ignore[attr-defined]
    c10d.ProcessGroupNCCL = dist.ProcessGroupNCCL = ProcessGroupNCCL  # type: ignore[attr-defined]
    c10d._NCCL_AVAILABLE = True
    c10d.is_nccl_available = dist.is_nccl_available = lambda: True
    cuda.nccl.version = lambda: (2, 28, 3)
    c10d.default_pg_nccl_timeout = c10d.default_pg_timeout
    c10d._get_default_timeout = lambda backend: c10d.default_pg_timeout

    make_group = c10d._new_process_group_helper

    def make_group_with_gloo(*args: Any, **options: Any) -> Any:
        group, _ = made = make_group(*args, **options)
        if isinstance(group, c10d.ProcessGroup) and group.size() > 0:
            devices = c10d.BackendConfig(c10d.Backend(c10d._world.pg_map[group][0])).device_backend_map
            if devices.get("cuda") == "gloo":
                gloo = group._get_backend(torch.device("cpu"))
                shared = ext.Collectives(gloo, group.rank(), group.size(), True)
                group._register_backend(torch.device("cuda"), c10d.ProcessGroup.BackendType.CUSTOM, shared)
        return made

    c10d._new_process_group_helper = make_group_with_gloo
