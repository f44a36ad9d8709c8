"""The GPU benchmark's cases build and train, on narrow models and this machine; its plans are of the cards it names."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def gpu(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark's module, imported as a script's."""
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
def test_a_case_trains_what_it_says(case: str, losses: int, gpu: ModuleType) -> None:
    told = gpu.run_case(case, small=True)
    assert told["loss"] == pytest.approx(losses, rel=0.3)  # random weights know nothing of unit noise
    assert told["seconds_a_step"] > 0


def test_every_case_is_planned_within_its_card(gpu: ModuleType, tmp_path: Path) -> None:
    for case in gpu.CASES:
        told = gpu.predict(gpu.make_recipe(case, tmp_path / case, small=True))
        assert 0 < told["predicted_gib"] <= gpu.CASES[case].card
