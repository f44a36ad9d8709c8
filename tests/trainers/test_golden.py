"""Tests that the loss curves of every method equal the recorded ones."""

from __future__ import annotations

import json
from pathlib import Path

import golden
import pytest

from dreamfleet.trainers.config.method import METHODS


@pytest.mark.parametrize("name", sorted(golden.RUNS))
def test_curve_equals_the_recorded_one(name: str, tmp_path: Path) -> None:
    curve = golden.compute_curve(name, tmp_path)
    same_processor = golden.processor_kind() == json.loads(golden.PROCESSOR.read_text())
    assert golden.find_difference(curve, golden.read_curve(name), same_processor=same_processor) is None


def test_the_recording_processor_allows_no_difference_and_others_a_small_one() -> None:
    recorded = golden.read_curve("dreambooth")
    exact = [loss + 4e-7 for loss in recorded]  # below the precision of the recording
    near = [recorded[0], recorded[1] + 2e-6, *recorded[2:]]
    far = [recorded[0], recorded[1] * 1.003, *recorded[2:]]
    for curve, tight, loose in ((exact, True, True), (near, False, True), (far, False, False)):
        assert (golden.find_difference(curve, recorded, same_processor=True) is None) is tight
        assert (golden.find_difference(curve, recorded, same_processor=False) is None) is loose
    assert "step 1" in (golden.find_difference(near, recorded, same_processor=True) or "")


def test_every_method_has_a_curve() -> None:
    covered = {run["method"]["name"] for run in golden.RUNS.values()}
    assert covered == set(METHODS.names())
