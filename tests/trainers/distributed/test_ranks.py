"""Test two ranks without Ray: results equal those of one rank, and decisions and errors reach all ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import two_ranks

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.report.metrics_log import read_metrics
from dreamfleet.trainers.run.run import run_worker

LONGEST = 240  # seconds until a rank that waits for the other is killed

pytestmark = pytest.mark.timeout(LONGEST + 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    two_ranks.make_folders(folder)
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    """Return the results of both ranks in every case; index 0 is rank 0."""
    ranks = [
        subprocess.Popen(
            [sys.executable, two_ranks.__file__, str(folder), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        output = [rank.communicate(timeout=LONGEST)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], output
    return [json.loads((folder / f"rank-{rank}/seen.json").read_text()) for rank in (0, 1)]


def test_rank_0_decides_for_all(seen: list[dict[str, Any]]) -> None:
    assert [rank["value of rank 0"] for rank in seen] == [{"value": [0]}] * 2
    for case in ("own value", "own value of a generator"):
        assert [rank[case]["value"] for rank in seen] == [0, 1]


def test_an_error_on_one_rank_is_raised_on_all(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["error on rank 0"] == {"error": "DataError", "message": "no such image"}
        for case in ("error on rank 1", "error on rank 1 in a generator"):
            assert rank[case]["error"] == "DataError"
            assert "a torn image (on rank 1, " in rank[case]["message"]
    assert [rank["fault on rank 0"]["error"] for rank in seen] == ["KeyError", "OtherRankFailed"]
    assert "a bug" in seen[1]["fault on rank 0"]["message"]


def test_results_of_shares_are_collected_in_order(seen: list[dict[str, Any]]) -> None:
    assert [rank["order"]["value"] for rank in seen] == [["0", "1", "2", "3", "4"]] * 2
    assert [rank["order on rank 0"]["value"] for rank in seen] == [[0, 1, 2, 3, 4], []]
    alone = DistributedContext()
    assert alone.collect(list(alone.share(3))) == [0, 1, 2]


def test_ranks_map_a_large_table_into_memory_from_a_file(seen: list[dict[str, Any]]) -> None:
    for place in ("in a common folder", "on one disk"):
        for rank in seen:
            found = rank[f"a table {place}"]["value"]
            assert found == {"rows": 100_000, "sum": sum(range(100_000)), "held": 0, "left": []}, rank


def test_two_ranks_generate_and_measure_like_one(folder: Path, seen: list[dict[str, Any]]) -> None:
    assert all("value" in rank["whole run"] for rank in seen), seen
    assert seen[1]["whole run"]["value"] == seen[0]["whole run"]["value"]
    assert "run.safetensors" in seen[1]["whole run"]["value"]["exports"]
    run_worker(build_recipe(two_ranks.whole_recipe(folder, "one", batch=2)))
    one, two = folder / "one", folder / "two"
    made = sorted(path.relative_to(one) for path in one.glob("class-images/*/*.png"))
    assert len(made) == 5
    for name in (*made, "run/samples/step-000000.png", "run/samples/step-000000.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    measured = [
        [line["holdout_loss"] for line in read_metrics(Storage(where / "run")) if "holdout_loss" in line]
        for where in (one, two)
    ]
    assert measured[0][0] == measured[1][0]  # equal weights before the first step
    assert measured[0] == pytest.approx(measured[1], rel=1e-5) and len(measured[0]) == 3


def test_two_ranks_evaluate_like_one(folder: Path, seen: list[dict[str, Any]]) -> None:
    assert all("value" in rank["discriminator"] for rank in seen), seen
    tree = two_ranks.whole_recipe(
        folder,
        "judge-alone",
        batch=2,
        method=two_ranks.DISCRIMINATOR,
        validation={"steps": 2},
        data__instance_data_dir=str(folder / "two"),
    )
    run_worker(build_recipe(tree))
    one, two = (
        next(line for line in read_metrics(Storage(folder / name / "run")) if "accuracy" in line)
        for name in ("judge-alone", "judge")
    )
    assert one == two and one["step"] == 0


@pytest.mark.parametrize(
    ("situation", "named"),
    [
        ("an image is missing", "fewer/002.png cannot be read"),
        ("an image differs", "changed/001.png has different content"),
        ("another model", "model.pretrained_model_name_or_path"),
        ("other templates", "method.template_file"),
        ("moments on one disk", "method.initial_embedding"),
        ("class images on one disk", "class/0"),
    ],
)
def test_different_files_are_an_error_on_all_ranks(
    seen: list[dict[str, Any]], situation: str, named: str
) -> None:
    for rank in seen:
        assert rank[situation].get("error") == "StorageError", rank[situation]
        assert named in rank[situation]["message"] and "rank 1" in rank[situation]["message"]
    assert seen[0][situation] == seen[1][situation]


def test_missing_data_on_rank_0_is_an_error_on_all_ranks(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["no data on one disk"]["error"] == "DataError"
        assert "only-on-1" in rank["no data on one disk"]["message"]


def test_a_checkpoint_missing_on_one_rank_is_an_error_on_all_ranks(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["a checkpoint on one disk"]["error"] == "CheckpointError"
        assert "step-000002" in rank["a checkpoint on one disk"]["message"]
