"""Runs the driver of a job, ``python -m dreamfleet.cluster.jobs.keep train ...``, again if a signal kills it.

Ray does not start the command of a job again. A driver dies alone if the head node runs out of memory, for example; its
run then continues from the newest checkpoint. Imports only the standard library, so that this process stays small.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

QUICK_SECONDS = 600.0  # a driver that lived longer does not count as a quick death
QUICK_DEATHS = 3  # so many in a row end the job
PR_SET_PDEATHSIG = 1  # of Linux's prctl
QUEUE = "queue"  # the first word of the command of a queue, which is no command of dreamfleet
RESUMABLE = ("train", "tune", "fleet")  # commands that take --resume; a cache needs no option to continue


def keep(
    command: Sequence[str],
    *,
    start: Callable[[Sequence[str]], int],
    stopping: Callable[[], bool],
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run ``command`` until it exits by itself, a stop was asked for, or it was killed QUICK_DEATHS times in a row.

    ``start`` runs a command and returns its exit code, negative for a signal. Returns the last exit code.
    """
    deaths = 0
    while True:
        began = clock()
        code = start(command)
        if code >= 0 or stopping():
            return code
        deaths = deaths + 1 if clock() - began < QUICK_SECONDS else 1
        name = signal.Signals(-code).name
        if deaths == QUICK_DEATHS:
            _say(
                f"the driver was killed by {name}; {deaths} times in a row it lived less than "
                f"{QUICK_SECONDS / 60:.0f} minutes"
            )
            return code
        command = resumed(command)
        _say(f"the driver was killed by {name}; starting it again from the newest checkpoint")


def resumed(command: Sequence[str]) -> list[str]:
    """Return the command that continues what ``command`` began."""
    again = list(command)
    if again[0] in RESUMABLE and not {"--resume", "--continue"} & set(again):
        again.append("--resume")
    return again


def run_bound(command: Sequence[str]) -> int:
    """Run a command that the kernel kills if this process dies, and return its exit code.

    Otherwise the driver of a job that Ray reports as failed would train on, and hold its output_dir.
    """
    parent = os.getpid()

    def bind() -> None:  # in the child, before the command starts
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died in the meantime
            os._exit(1)

    return subprocess.Popen(command, preexec_fn=bind if sys.platform == "linux" else None).wait()


def main(arguments: Sequence[str]) -> int:
    """Keep ``dreamfleet ARGUMENTS`` running in this job; return its exit code."""
    stop = False

    def note_stop(number: int, frame: FrameType | None) -> None:
        nonlocal stop
        stop = True  # Ray sends the signal of a stop to the driver too

    signal.signal(signal.SIGTERM, note_stop)
    signal.signal(signal.SIGINT, note_stop)

    def start(command: Sequence[str]) -> int:
        return run_bound([sys.executable, "-m", module, *command])

    module = "dreamfleet.cluster.cli"
    if arguments[0] == QUEUE:
        module, arguments = "dreamfleet.cluster.jobs.queue_job", arguments[1:]
    code = keep(arguments, start=start, stopping=lambda: stop)
    if code < 0:  # end by the same signal, so that Ray reports it
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    return code


def _say(text: str) -> None:
    sys.stderr.write(f"dreamfleet: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
