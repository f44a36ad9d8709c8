"""fleet.parquet: its columns, its types, and its row groups."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet
import pytest
from fleets import make_failed, make_row

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.tune.fleet import parquet
from dreamfleet.tune.fleet.parquet import write_fleet_table
from dreamfleet.tune.fleet.rows import SubjectRow, scores_of


def test_the_table_has_a_row_per_subject_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "GROUP", 2)
    rows = [
        make_row(0, values={"train.seed": 3, "optimizer.learning_rate": 1, "data.random_flip": True}),
        make_failed(1, reason="the folder \udcff contains no images"),
        make_row(2, scores={"dino": 0.5, "name": 2.0}, values={"optimizer.learning_rate": 0.5}),
        make_row(3, values={"model.max_token_length": 75}),
        make_row(4, values={"model.max_token_length": "long", "validation.prompts": ["a", "b"]}),
    ]
    write_fleet_table(Storage(tmp_path), rows)
    file = pyarrow.parquet.ParquetFile(tmp_path / "fleet.parquet")
    assert file.num_row_groups == 3
    found = file.read().to_pylist()
    assert [row["name"] for row in found] == [f"cat {n}" for n in range(5)]
    assert [row["row"] for row in found] == list(range(5))
    assert found[1]["status"] == "failed" and found[1]["reason"] == "the folder \\udcff contains no images"
    assert found[1]["run_folder"] is None and found[1]["clip_i"] is None and found[1]["artifacts"] == []
    assert found[0]["artifacts"] == ["subjects/cat 0/exports/cat 0.pt"]
    assert found[0]["tuned_image"] == "subjects/cat 0/samples/step-000100.png"
    assert found[3]["clip_i"] == 0.03 and found[2]["dino"] == 0.5 and found[2]["score_name"] == 2.0
    # Recipe keys keep their type; one with values of several types is JSON text.
    assert [row["train.seed"] for row in found] == [3, None, None, None, None]
    assert [row["optimizer.learning_rate"] for row in found] == [1.0, None, 0.5, None, None]
    assert found[0]["data.random_flip"] is True
    assert [row["model.max_token_length"] for row in found[3:]] == ["75", '"long"']
    assert found[4]["validation.prompts"] == '["a", "b"]'


def test_a_fleet_without_subjects_has_an_empty_table(tmp_path: Path) -> None:
    write_fleet_table(Storage(tmp_path), [])
    assert pyarrow.parquet.read_table(tmp_path / "fleet.parquet").num_rows == 0


def test_scores_are_the_metrics_among_the_figures_of_a_summary() -> None:
    figures = {"clip_i": 0.5, "holdout_loss": 1, "loss": 0.1, "images_per_second": 9.0, "accuracy/cat": 0.75}
    assert scores_of(figures) == {"clip_i": 0.5, "holdout_loss": 1.0, "accuracy/cat": 0.75}
    assert SubjectRow("a").scores == {}
