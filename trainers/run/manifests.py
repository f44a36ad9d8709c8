"""Names of the files of checkpoints: from the second attempt of a run on they carry the attempt's number.

A write of a process that was replaced, which the network or a stopped process delivers late, then never changes a file
of its successor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from dreamfleet.datasets.storage.disk import inside
from dreamfleet.trainers.run.fence import Fence
from dreamfleet.trainers.run.lease import Attempt, is_superseded

MANIFEST = "manifest.json"
_ATTEMPT = re.compile(r"\.attempt-(\d+)\.")
_ANY_MANIFEST = re.compile(r"manifest(?:\.attempt-(\d+))?\.json")


def stored_name(file: str, fence: Fence | None) -> str:
    """Return the name under which an attempt stores a file of a checkpoint: engine.pt, or engine.attempt-0002.pt."""
    if fence is None or fence.is_first:
        return file
    stem, dot, suffix = file.partition(".")
    return f"{stem}.attempt-{fence.attempt:04d}{dot}{suffix}"


def attempt_of(name: str) -> int:
    """Return the attempt in the name of a stored file; 0 for a name without."""
    match = _ATTEMPT.search(name)
    return int(match[1]) if match else 0


def path_of(files: dict[str, Any], file: str) -> str:
    """Return the name under which a file is stored; ``files`` are the entries of the manifest."""
    return inside(str(files.get(file, {}).get("path", file)))


def find_manifest(names: Iterable[str], step: int, attempts: Sequence[Attempt]) -> str | None:
    """Return which of the files of a step's checkpoint is its manifest; None if it has no valid one.

    It is that of the newest attempt that is not superseded (:func:`is_superseded`). A manifest without a number is of
    the first attempt of a new run, or of a version without attempts.
    """
    first = 1 if attempts and attempts[0].step == 0 else 0
    numbers = {name: int(match[1] or first) for name in names if (match := _ANY_MANIFEST.fullmatch(name))}
    for name, attempt in sorted(numbers.items(), key=lambda item: -item[1]):
        if not is_superseded(attempts, attempt=attempt, step=step):
            return name
    return None
