"""Test that a killed driver is started again, and when not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from dreamfleet.cluster.jobs import keep
from dreamfleet.cluster.jobs.package import start_script


def run(codes: list[int], *, seconds: float = 1.0, stop_at: int = 99) -> tuple[int, list[list[str]]]:
    started: list[list[str]] = []
    now = 0.0

    def start(command: Sequence[str]) -> int:
        nonlocal now
        now += seconds
        started.append(list(command))
        return codes.pop(0)

    code = keep.keep(
        ["train", "recipe.yaml"], start=start, stopping=lambda: len(started) >= stop_at, clock=lambda: now
    )
    return code, started


def test_a_driver_that_exits_is_not_started_again() -> None:
    for code in (0, 1, 2, 130):
        assert run([code]) == (code, [["train", "recipe.yaml"]])


def test_a_killed_driver_continues_its_run() -> None:
    code, started = run([-9, 0])
    assert (code, started[1]) == (0, ["train", "recipe.yaml", "--resume"])


def test_three_quick_deaths_end_the_job_and_slow_ones_do_not() -> None:
    code, started = run([-9, -9, -9, 0])
    assert (code, len(started)) == (-9, 3)
    code, started = run([-9, -9, -9, -9, 0], seconds=keep.QUICK_SECONDS + 1)
    assert (code, len(started)) == (0, 5)


def test_a_driver_ends_with_its_keeper(tmp_path: Path) -> None:
    beats = tmp_path / "beats"
    driver = f"import time\nwhile True: open({str(beats)!r}, 'a').write('.'); time.sleep(0.05)"
    command = f"[sys.executable, '-c', {driver!r}]"
    program = f"import sys; from dreamfleet.cluster.jobs.keep import run_bound; run_bound({command})"
    keeper = subprocess.Popen([sys.executable, "-c", program])
    while not beats.exists() or not beats.stat().st_size:
        assert keeper.poll() is None
        time.sleep(0.05)
    keeper.kill()
    keeper.wait()
    time.sleep(0.5)
    size = beats.stat().st_size
    time.sleep(0.5)
    assert beats.stat().st_size == size


def test_a_stopped_job_is_not_continued() -> None:
    code, started = run([-15, 0], stop_at=1)
    assert (code, len(started)) == (-15, 1)


def test_only_commands_with_checkpoints_get_resume() -> None:
    assert keep.resumed(["data", "cache", "recipe.yaml"]) == ["data", "cache", "recipe.yaml"]
    assert keep.resumed(["tune", "r.yaml", "--resume"]) == ["tune", "r.yaml", "--resume"]
    assert keep.resumed(["fleet", "s.csv", "r.yaml"])[-1] == "--resume"
    assert keep.resumed(["train", "r.yaml", "--continue"]) == ["train", "r.yaml", "--continue"]


def test_a_job_ends_by_the_signal_that_killed_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from dreamfleet.cluster.jobs import keep\n"
        "keep.keep = lambda *a, **k: -int(sys.argv[1])\nkeep.main(['train'])"
    )
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV):
        done = subprocess.run([sys.executable, "-c", code, str(int(number))])
        assert done.returncode == -number


def test_the_start_script_runs_the_python_of_the_raylet(tmp_path: Path) -> None:
    """Test it below a process that looks like a raylet, with another `python` first on PATH."""
    (tmp_path / "python3").write_text("#!/bin/sh\necho wrong python\n")
    (tmp_path / "python3").chmod(0o755)
    (tmp_path / "raylet.py").write_text(
        "import subprocess, sys\n"
        "show = 'import sys; print(sys.prefix)'\n"
        "supervisor = f\"import subprocess, sys; subprocess.run(['sh', sys.argv[1], '-c', '{show}'])\"\n"
        "subprocess.run([sys.executable, '-c', supervisor, sys.argv[1]])\n"
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = [sys.executable, str(tmp_path / "raylet.py"), str(start_script())]
    worker = f"--python_worker_command={sys.executable} /x/setup_worker.py --node-ip-address=1.2.3.4"
    done = subprocess.run([*command, worker], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == sys.prefix, done.stderr
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "wrong python", "without a raylet, PATH decides"
