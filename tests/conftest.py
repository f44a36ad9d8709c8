"""Settings of all tests: offline, quiet, no configured cluster, a limit on hangs, and GPU tests only with a GPU."""

import faulthandler
import os
import shutil
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Read when the libraries are first imported, in this process and in processes that tests start.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads only slow tiny models down
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
os.environ.setdefault("DREAMFLEET_CACHE", str(ROOT / ".cache" / "dreamfleet"))
os.environ.pop("RAY_ADDRESS", None)  # a test must not join a cluster that is configured here


# A shell makes background processes and their children ignore SIGINT, which several tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


GRACE = 15  # seconds between a test's timeout and the end of a process that did not notice it
_STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the terminal's stderr for the stacks of a hang, because stderr is captured during a test."""
    config.stash[_STDERR] = os.dup(sys.__stderr__.fileno() if sys.__stderr__ else 2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """End the process with the stacks of all threads if a test outlives its timeout.

    pytest-timeout fails the test by a signal, and the next one runs. A signal is handled by Python, though, and some
    hangs keep Python from running: a deadlock with the GIL held, a wait in C++. faulthandler's thread needs no GIL.
    """
    marker = item.get_closest_marker("timeout")
    timeout = marker.args[0] if marker and marker.args else item.config.getoption("timeout", None)
    limit = float(timeout or item.config.getini("timeout"))
    faulthandler.dump_traceback_later(limit + GRACE, exit=True, file=item.config.stash[_STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` if there is no GPU."""
    if _has_gpu():
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold the names of folders too
            item.add_marker(skip)


@pytest.fixture
def lone_group() -> Iterator[None]:
    """A process group of this process alone, which ends after every DDP module in it."""
    from dreamfleet.trainers.distributed import process_group

    with process_group.lone_group():
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="module", autouse=True)
def _no_ray_is_left_running() -> Iterator[None]:
    """End a Ray that a file of tests left running, which the next file would join, and fail."""
    yield
    if ray := sys.modules.get("ray"):
        left = ray.is_initialized()
        ray.shutdown()
        assert not left, "this file of tests left Ray running"
