"""Tests of stacks, notices and SIGTERM in processes that a test starts, without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from dreamfleet.trainers.driver.worker_process import Process, read_stacks

PROGRAM = """
import sys, threading, time
from dreamfleet.trainers.distributed.pulse import Pulse, training_here
from dreamfleet.trainers.driver import worker_process

def wait_in_a_thread():
    time.sleep(60)

threading.Thread(target=wait_in_a_thread, daemon=True).start()
process = worker_process.prepare()
with training_here(Pulse()) as pulse:
    print(process.pid, process.stacks, flush=True)
    while pulse.notice is None:
        time.sleep(0.05)
    print(pulse.notice.reason, 0 < pulse.notice.seconds_left <= worker_process.GRACE_SECONDS, flush=True)
print(worker_process.read_beat(), flush=True)
time.sleep(60)
"""
Start = Callable[[], tuple["subprocess.Popen[str]", Process]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts a process that trains nothing, and returns it once it is prepared."""
    started: list[subprocess.Popen[str]] = []

    def run() -> tuple[subprocess.Popen[str], Process]:
        child = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
        started.append(child)
        assert child.stdout is not None
        pid, stacks = child.stdout.readline().split()
        return child, Process(int(pid), stacks)

    yield run
    for child in started:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def test_the_stacks_of_all_threads_are_read_and_the_process_is_ended_if_wanted(start: Start) -> None:
    child, process = start()
    text = read_stacks(process, kill=False)
    assert "wait_in_a_thread" in text and text.lower().count("thread 0x") == 2
    assert child.poll() is None
    os.kill(process.pid, signal.SIGSTOP)
    assert "is stopped" in read_stacks(process, kill=True)
    assert child.wait(timeout=10) == -signal.SIGKILL
    assert "no stacks" in read_stacks(process, kill=True)


def test_sigterm_is_a_notice_while_a_run_trains_and_ends_the_process_otherwise(start: Start) -> None:
    child, _ = start()
    assert child.stdout is not None
    child.terminate()
    assert child.stdout.readline().split() == ["SIGTERM", "True"]
    assert child.stdout.readline().strip() == "None"
    time.sleep(0.1)
    assert child.poll() is None
    child.terminate()
    assert child.wait(timeout=10) == -signal.SIGTERM
