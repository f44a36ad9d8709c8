"""Tests that a hanging test fails within its timeout with the stacks of all threads, even if it holds the GIL."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

SOURCE = """
import ctypes, threading, time
import pytest

def test_before(): pass

@pytest.mark.timeout(1)
def test_hangs():
    threading.Thread(target=time.sleep, args=(60,), daemon=True, name="bystander").start()
    {hang}

def test_after(): pass
"""


def run_pytest(folder: Path, root: Path, hang: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a file whose second test hangs, with this project's settings; return the process and its seconds."""
    conftest = (root / "tests/conftest.py").read_text()
    (folder / "conftest.py").write_text(conftest.replace("GRACE = 15", "GRACE = 1"))
    (folder / "test_it.py").write_text(SOURCE.format(hang=hang))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", str(root / "pyproject.toml")]
    began = time.monotonic()
    ended = subprocess.run(
        [*command, "--rootdir", str(folder), str(folder)],
        capture_output=True,
        text=True,
        timeout=90,
        cwd=folder,
        check=False,
    )
    return ended, time.monotonic() - began


@pytest.mark.parametrize("library", ["PyDLL", "CDLL"])  # with and without the GIL held
def test_a_deadlock_in_c_ends_pytest_with_all_stacks(library: str, tmp_path: Path, root: Path) -> None:
    hang = f"m = ctypes.create_string_buffer(64); [ctypes.{library}(None).pthread_mutex_lock(m) for _ in range(2)]"
    ended, seconds = run_pytest(tmp_path, root, hang)
    assert ended.returncode == 1 and seconds < 60, ended.stdout + ended.stderr
    assert "Timeout (" in ended.stderr and "in test_hangs" in ended.stderr
    assert ended.stderr.count("(most recent call first)") >= 2  # also of the second thread
    assert "passed" not in ended.stdout  # must not look successful


def test_a_hang_in_python_fails_its_test_alone(tmp_path: Path, root: Path) -> None:
    ended, seconds = run_pytest(tmp_path, root, "threading.Event().wait()")
    assert ended.returncode == 1 and seconds < 60
    assert "2 passed" in ended.stdout and "1 failed" in ended.stdout and "Timeout" in ended.stdout
    assert "bystander" in ended.stdout + ended.stderr
