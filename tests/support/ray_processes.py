"""Finds the processes of Ray's training workers."""

from __future__ import annotations

import os
import re
from pathlib import Path

from servers import S3Server, s3_server  # noqa: F401 - a fixture


def worker_processes() -> list[int]:
    """Return the IDs of the training workers, which Ray marks in the command line, among the child processes."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "status").read_text()
            names[int(entry.name)] = (entry / "cmdline").read_text()
        except OSError:
            continue
        if found := re.search(r"^PPid:\s+(\d+)", status, re.MULTILINE):
            parents[int(entry.name)] = int(found[1])
    workers = []
    for process, name in names.items():
        above = process
        while above in parents and above != os.getpid():
            above = parents[above]
        if above == os.getpid() and name.startswith("ray::") and "TrainWorker" in name:
            workers.append(process)
    return sorted(workers)
