"""Tests that a run of [1, 4] workers computes the same weights, in every bit, at each number of workers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import elastic_ranks
import pytest
import torch

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.method import METHODS
from dreamfleet.trainers.run.checkpoint import Checkpoints

NAMES = sorted({*METHODS.names(), "dropout", "prior", "buckets", "prodigy", "schedule-free"})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    done = subprocess.run(
        [sys.executable, elastic_ranks.__file__, str(folder)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_weights_and_optimizer_states_are_bit_equal(trained: Path, name: str) -> None:
    alone = end_of(trained / name / "1")
    for world in elastic_ranks.WORLDS[1:]:
        other = end_of(trained / name / str(world))
        assert alone.keys() == other.keys()
        different = [key for key, value in alone.items() if not torch.equal(value, other[key])]
        assert not different, f"{world} workers: {different}"


@pytest.mark.slow
def test_the_metrics_are_of_the_whole_batch(trained: Path) -> None:
    for world in elastic_ranks.WORLDS[1:]:
        lines = [read_lines(trained / "dropout" / str(number)) for number in (1, world)]
        for alone, other in zip(*lines, strict=True):
            assert other["loss"] == pytest.approx(alone["loss"], rel=1e-6)
            assert other["grad_norm"] == alone["grad_norm"]


@pytest.mark.slow
def test_an_all_reduce_has_the_same_sum_but_for_rounding(trained: Path) -> None:
    alone = read_lines(trained / "all-reduce" / "1")[0]
    for world in elastic_ranks.WORLDS[1:]:
        other = read_lines(trained / "all-reduce" / str(world))[0]
        assert other["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
        assert other["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def read_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def end_of(run: Path) -> dict[str, torch.Tensor]:
    found = Checkpoints(Storage(str(run))).load_latest()
    assert found is not None and found.step == 3
    states = found.engine["optimizer"]["state"]
    return {
        **found.learned,
        **{
            f"{number}.{key}": value
            for number, state in states.items()
            for key, value in state.items()
            if isinstance(value, torch.Tensor)
        },
    }
