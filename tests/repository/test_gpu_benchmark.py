"""Tests that the GPU benchmark's cases train with narrow models on a CPU, and that the estimates fit the GPUs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def gpu(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the benchmark's module, imported as when it runs as a script."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import gpu

    return gpu


@pytest.fixture(autouse=True)
def forget_scripts() -> None:
    for name in ("gpu", "gpu_cases", "gpu_speed", "measure"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("case", "losses"), [("sd15-dreambooth-auto-12g", 2), ("sdxl-dreambooth-fused-10g", 1)]
)
def test_a_case_trains(case: str, losses: int, gpu: ModuleType) -> None:
    measured = gpu.run_case(case, small=True)
    assert measured["loss"] == pytest.approx(
        losses, rel=0.3
    )  # the loss of an untrained model that predicts unit noise is about 1
    assert measured["seconds_a_step"] > 0


def test_every_estimate_fits_its_gpu(gpu: ModuleType, tmp_path: Path) -> None:
    for case in gpu.CASES:
        estimate = gpu.predict(gpu.make_recipe(case, tmp_path / case, small=True))
        assert 0 < estimate["predicted_gib"] <= gpu.CASES[case].card
