"""Converts an artifact to another of its kind's formats."""

from __future__ import annotations

from pathlib import Path

from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.artifacts.kind import detect_kind


def convert_artifact(source: Path, target: Path) -> Path:
    """Write ``source`` in the format given by the suffix of ``target``.

    Raises FormatError if the kind of ``source`` is unknown, UserError if its kind does not have this format or
    ``target`` exists.
    """
    if not source.exists():
        raise UserError(f"there is no {source}")
    if target.exists():
        raise UserError(f"{target} exists already; give another name")
    return detect_kind(source).convert(source, target)
