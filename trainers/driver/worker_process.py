"""What the driver's side runs in the processes of workers and on their nodes: progress, notices and stacks."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from dreamfleet.trainers.distributed import pulse
from dreamfleet.trainers.distributed.pulse import Beat, Notice

STACK_SIGNAL = signal.SIGUSR2
STACK_SECONDS = 5.0
GRACE_SECONDS = (
    30.0  # between SIGTERM and the end of the process; Kubernetes and spot nodes give at least as much
)
_files: list[Any] = []  # faulthandler writes to them


class Process(NamedTuple):
    """A worker's process number, and the file into which it writes its stacks when it receives STACK_SIGNAL."""

    pid: int
    stacks: str


def prepare() -> Process:
    """Prepare this worker's process to be watched; runs in the main thread of the actor."""
    if not _files:
        handle, path = tempfile.mkstemp(prefix="dreamfleet-stacks-", suffix=".txt")
        _files[:] = [os.fdopen(handle, "w"), path]
        faulthandler.register(STACK_SIGNAL, file=_files[0], all_threads=True)
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda number, frame: _on_sigterm(number, frame, before))
    return Process(os.getpid(), _files[1])


def read_beat() -> Beat | None:
    """Return the progress of the run in this process; None before it begins."""
    now = pulse.current()
    return now.beat() if now is not None else None


def give_notice(reason: str, seconds: float | None) -> None:
    """Have the run in this process save a checkpoint and leave within ``seconds``."""
    now = pulse.current()
    if now is not None and now.notice is None:
        now.notice = Notice(reason, time.monotonic(), seconds)


def read_stacks(process: Process, kill: bool) -> str:
    """Return the stacks of a process of this node, or why there are none; then kill it, if ``kill``."""
    try:
        return _ask_for_stacks(process)
    except (OSError, ValueError) as error:
        return f"no stacks: {error}"
    finally:
        if kill:
            with contextlib.suppress(OSError):
                os.kill(process.pid, signal.SIGKILL)


def _ask_for_stacks(process: Process) -> str:
    file = Path(process.stacks)
    before, size, end = file.stat().st_size, -1, time.monotonic() + STACK_SECONDS
    os.kill(process.pid, STACK_SIGNAL)
    while (state := _state(process.pid)) not in "Tt" and time.monotonic() < end:
        time.sleep(0.1)
        last, size = size, file.stat().st_size
        if before < size == last:
            return file.read_text(errors="replace")[before:]
    why = "is stopped (SIGSTOP or a debugger) and does" if state in "Tt" else f"(state {state}) did"
    return f"no stacks: process {process.pid} {why} not answer"


def _state(pid: int) -> str:
    """Return the letter of a process's state in Linux: R runs, S sleeps, D waits for a disk, T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _on_sigterm(number: int, frame: Any, before: Any) -> None:
    """Leave after a checkpoint if a run trains here; end as before at the second signal and after GRACE_SECONDS."""
    now = pulse.current()
    if now is None or now.notice is not None:
        if callable(before):
            before(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
    give_notice("SIGTERM", GRACE_SECONDS)
    timer = threading.Timer(GRACE_SECONDS, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()
