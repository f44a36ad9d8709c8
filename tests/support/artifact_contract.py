"""Checks the contract of an artifact kind on one file or folder."""

from __future__ import annotations

from pathlib import Path

import torch

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.artifacts.conversion import convert_artifact
from dreamfleet.trainers.artifacts.kind import ARTIFACTS, ArtifactKind, detect_kind
from dreamfleet.trainers.artifacts.loading import folder_kind, is_artifact_name
from dreamfleet.trainers.artifacts.usage import describe


def check_kind(kind: ArtifactKind, source: Path, target: Path, *, method: str) -> None:
    """Check that ``source`` is detected, converts to ``target`` and back without loss, and has a usage text.

    ``method``: the name of a method that exports the kind.
    """
    assert ARTIFACTS.get(kind.name) is type(kind)
    assert kind.formats and (kind.suffixes or kind.marker)
    assert type(detect_kind(source)) is type(kind)
    if source.is_dir():
        assert type(folder_kind(Storage(source))) is type(kind)
    else:
        assert is_artifact_name(source.name)
    expected = kind.read_back(source)
    assert expected and all(tensor.numel() for tensor in expected.values())
    there = convert_artifact(source, target)
    back = convert_artifact(there, target.with_name(f"back-{source.name}"))
    for path in (there, back):
        found = kind.read_back(path)
        assert found.keys() == expected.keys()
        assert all(
            torch.allclose(found[name], tensor, rtol=0, atol=1e-6) for name, tensor in expected.items()
        )
    usage = describe(source.name, run_name=source.stem, recipe={"method": {"name": method, "lora_rank": 4}})
    assert usage.what and usage.uses and all(use.program and use.text for use in usage.uses)
