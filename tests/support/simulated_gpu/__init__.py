"""A simulated CUDA GPU for torch's CPU build: call :func:`install` once, before any use of a device.

Tensors on ``cuda`` are real torch tensors of the CUDA device type with separate storage, generators, streams
and page-locked memory; their kernels run on the host over the same bytes. The code under test therefore takes
the same branches as on a GPU, and errors of a GPU occur here too: mixed devices, a generator of the wrong
device, NumPy arrays of GPU tensors, operators without a CUDA kernel, CPU tensors over NCCL, two ranks on one
device over NCCL, and out of memory. Every operation that makes the host wait is recorded with the line of
code that called it.

Not simulated: the results and speed of real kernels, asynchronous execution (nothing overlaps), NCCL, cuDNN,
and compiled kernels. Requires the version of torch in ``TORCH`` (internal headers are used), a C++ compiler,
and a separate process.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
TORCH = "2.13"
MEMORY = 80 * 2**30
CONTEXT = 400 * 2**20  # bytes of device memory that a process uses in addition to its tensors
#: Operators whose result the host needs: each waits for all work that was queued before it.
WAITING = (
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::nonzero.out", "aten::masked_select",
    "aten::masked_select.out", "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::repeat_interleave.Tensor", "aten::bincount", "aten::is_nonzero",
)  # fmt: skip

ext: Any = None  # the compiled module, once installed
_busy = threading.local()


class Event(NamedTuple):
    """One recorded event: its kind, the operation, the number of bytes, and the calling lines, innermost first."""

    kind: str
    what: str
    size: int
    lines: tuple[str, ...]


events: list[Event] = []


def missing() -> str | None:
    """Return the reason why no GPU can be simulated on this machine; None if one can."""
    import torch

    if torch.cuda.is_available():
        return None  # the real one is used
    if torch.version.cuda is not None:
        return "this torch has CUDA itself, but no GPU"
    if not torch.__version__.startswith(f"{TORCH}."):
        return f"made for torch {TORCH}, this is {torch.__version__}"
    if shutil.which("c++") is None and shutil.which("g++") is None:
        return "no C++ compiler (apt-get install g++)"
    return None


def install(*, devices: int = 1) -> Any:
    """Simulate ``devices`` GPUs of ``MEMORY`` bytes each; the first call compiles the extension.

    With a real GPU, nothing is simulated: the cases run on it.
    """
    global ext, MEMORY
    if ext is not None:
        return ext
    if (reason := missing()) is not None:
        raise RuntimeError(f"no GPU can be simulated: {reason}")
    if is_real():
        from simulated_gpu.real import RealGpu

        ext = RealGpu()
        MEMORY = ext.memory()
        return ext
    built = build()
    unchecked, cpu_only = _operators()
    if not built.install(devices, unchecked, cpu_only, list(WAITING), _record):
        raise RuntimeError("torch asked for CUDA before the simulated GPU was installed: install it earlier")
    built.set_total(MEMORY)
    ext = built
    from simulated_gpu import patches

    patches.apply(built, devices)
    return ext


def is_real() -> bool:
    """Return whether the cases run on a real GPU; it is asked for before anything is simulated."""
    import torch

    return torch.version.cuda is not None and torch.cuda.is_available()


def build() -> Any:
    """Compile the extension (half a minute, cached in TORCH_EXTENSIONS_DIR) under a lock, and load it."""
    from torch.utils.cpp_extension import _get_build_directory, load

    name = "simulated_cuda"
    folder = Path(_get_build_directory(name, verbose=False))
    os.environ.setdefault("MAX_JOBS", "1")
    with FileLock(folder / "build.lock"):
        (folder / "lock").unlink(missing_ok=True)  # torch's lock file, left by a build that was killed
        source = str(HERE / "simulated_cuda.cpp")
        return load(name, [source], build_directory=str(folder), extra_cflags=["-O1", "-g0"])


@contextmanager
def recorded() -> Iterator[list[Event]]:
    """Record the events within this context; the yielded list is filled when the context ends."""
    start, found = len(events), []
    if is_real():
        with ext.recording(_record):
            yield found
        found += events[start:]
        del events[start:]
        return
    ext.record(True)
    try:
        yield found
    finally:
        ext.finish_copies()
        ext.record(False)
        found += events[start:]
        del events[start:]


@contextmanager
def memory_of(size: int) -> Iterator[None]:
    """Limit every device to ``size`` bytes for tensors within this context; the reported memory is unchanged."""
    ext.set_total(size)
    try:
        yield
    finally:
        ext.set_total(MEMORY)


def _record(kind: str, what: str, size: int) -> None:
    if getattr(_busy, "value", False):
        return
    _busy.value = True
    try:
        lines: list[str] = []
        frame = sys._getframe().f_back  # None in an autograd thread
        while frame is not None and len(lines) < 6:
            if line := _line_of(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name):
                lines.append(line)
            frame = frame.f_back
        events.append(Event(kind, what, size, tuple(lines)))
    finally:
        _busy.value = False


def _line_of(file: str, number: int, function: str) -> str | None:
    """Return a line of code of the project or of a library other than torch as text; None for other lines."""
    if "site-packages/" in file:
        short = file.split("site-packages/")[1]
        return None if short.startswith("torch/") else f"[{short}:{number} {function}]"
    path = Path(file).resolve()
    if path.parent == HERE:  # code of the simulation
        return None
    return f"{path.relative_to(ROOT)}:{number} {function}" if path.is_relative_to(ROOT) else None


def _operators() -> tuple[list[str], list[str]]:
    """Return the operators of torch that check devices themselves, and those without a CUDA kernel."""
    import torchgen
    import yaml

    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    with path.open() as handle:
        entries = yaml.load(handle, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    by_name = {entry["func"].split("(")[0]: entry for entry in entries}
    unchecked = [f"aten::{name}" for name, entry in by_name.items() if entry.get("device_check") == "NoCheck"]
    cpu_only = []
    for name, entry in by_name.items():
        parent = entry.get("structured_delegate")
        dispatch = (by_name[parent] if parent else entry).get("dispatch")
        if not dispatch:
            continue  # composed of other operators
        keys = {key.strip() for keys in dispatch for key in keys.split(",")}
        if "CPU" in keys and not any(key == "CUDA" or key.startswith("Composite") for key in keys):
            cpu_only.append(f"aten::{name}")
    return unchecked, cpu_only
