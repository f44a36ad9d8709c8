"""The loss curves of every method are what they were: a change of numbers is on purpose, or it is a bug."""

from __future__ import annotations

import json
from pathlib import Path

import golden
import pytest

from dreamfleet.trainers.config.method import METHODS


@pytest.mark.parametrize("name", sorted(golden.RUNS))
def test_curve_is_the_kept_one(name: str, tmp_path: Path) -> None:
    kept = json.loads((golden.FOLDER / f"{name}.json").read_text())
    # Sums are ordered differently by other numbers of threads and vector widths; a changed formula moves far more.
    assert golden.compute_curve(name, tmp_path) == pytest.approx(kept, rel=2e-3)


def test_every_method_has_a_curve() -> None:
    covered = {run["method"]["name"] for run in golden.RUNS.values()}
    assert covered == set(METHODS.names())
