"""Test whole fleets of tiny runs in this process: results, resume, limits, changed rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from dreamfleet.datasets.errors import CheckpointError, RecipeError, UserError
from dreamfleet.tune.fleet import finisher
from dreamfleet.tune.fleet.fleet import FleetResult, fleet
from dreamfleet.tune.fleet.records import Records

STEPS = {"train__max_train_steps": 2, "train__train_batch_size": 1}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tree = tiny.make_recipe(
        tmp_path, output_dir="fleet", method__name="dreambooth", method__lora_rank=2, **STEPS
    )
    del tree["data"]["instance_data_dir"]
    tiny.write_recipe(tmp_path / "recipe.yaml", tree)
    for number in range(3):
        tiny.make_images(tmp_path / f"s{number}", 2, seed=number)
    return tmp_path


def train(place: Path, table: str, *overrides: str, **options: Any) -> FleetResult:
    (place / "table.csv").write_text(table)
    return fleet(place / "table.csv", place / "recipe.yaml", overrides=overrides, **options)


def steps_trained(place: Path) -> dict[str, int]:
    """Return the lines of steps in the metrics of each subject, which grow if a subject is trained again."""
    return {
        path.parent.name: len([line for line in path.read_text().splitlines() if "loss" in json.loads(line)])
        for path in (place / "fleet/subjects").glob("*/metrics.jsonl")
    }


TABLE = "name,images,train.max_train_steps\na,s0,\nb,s1,3\n"


def test_every_subject_is_a_run_and_a_bad_one_fails_alone(place: Path) -> None:
    (place / "bad").mkdir()
    (place / "bad/x.png").write_text("no image")
    result = train(place, TABLE + "bad,bad,\n")
    assert (result.exit_reason, result.total, result.completed, result.failed) == ("completed", 3, 2, 1)
    a, b, bad = result.rows
    assert [a.status, b.status, bad.status] == ["completed", "completed", "failed"]
    assert (a.steps, b.steps, b.row) == (2, 3, 3)
    assert "x.png" in (bad.reason or "")
    status = json.loads((place / "fleet/subjects/bad/summary.json").read_text())
    assert (status["exit_reason"], status["error"]) == ("failed", bad.reason)
    run = place / "fleet/subjects/b"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["data"]["instance_data_dir"] == str(place / "s1")
    assert (place / "fleet" / a.artifacts[0]).exists() and "a" in Path(a.artifacts[0]).name
    assert not (run / "checkpoints").exists()
    for path in (result.table, result.page, run / "report.html"):
        assert Path(path).exists()


def test_resume_trains_only_what_is_not_finished(place: Path) -> None:
    (place / "later").mkdir()
    (place / "later/x.png").write_text("no image yet")
    train(place, TABLE + "later,later,\n")
    with pytest.raises(RecipeError, match="--resume"):
        train(place, TABLE)
    before = steps_trained(place)
    tiny.make_images(place / "later", 1)
    (place / "later/x.png").unlink()
    result = train(place, TABLE + "later,later,\nnew,s2,\n", resume=True)
    assert (result.completed, result.failed) == (4, 0)
    assert steps_trained(place) == {**before, "later": 2, "new": 2}
    assert result.rows[0].steps == 2  # of the first command
    with pytest.raises(CheckpointError, match=r"optimizer\.learning_rate: there .*, here 0\.5"):
        train(place, TABLE, "optimizer.learning_rate=0.5", resume=True)


def test_changed_rows_of_finished_subjects_are_refused(place: Path) -> None:
    train(place, TABLE)
    changed = TABLE.replace("a,s0,", "a,s2,")
    with pytest.raises(RecipeError, match=r"row 2: 'a' was completed with other values"):
        train(place, changed, resume=True)
    (place / "fleet/subjects/a").rename(place / "removed")
    result = train(place, changed, resume=True)
    assert result.completed == 2
    assert steps_trained(place) == {"a": 2, "b": 3}


def test_a_fleet_killed_before_its_record_was_written_repeats_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Records, "append", lambda self, lines: None)
        train(place, TABLE, "fleet.max_subjects=1")
    assert not list(Records(finisher.Storage(place / "fleet")))
    summary = place / "fleet/subjects/a/summary.json"
    written = summary.stat().st_mtime_ns
    result = train(place, TABLE, resume=True)
    assert result.completed == 2 and result.rows[0].steps == 2
    assert summary.stat().st_mtime_ns == written


def test_a_started_subject_whose_row_changed_is_refused(place: Path) -> None:
    train(place, TABLE)
    summary = place / "fleet/subjects/a/summary.json"
    summary.unlink()
    for path in (place / "fleet/records").iterdir():
        path.unlink()
    with pytest.raises(RecipeError, match=r"row 2: 'a' was started with another data.instance_data_dir"):
        train(place, TABLE.replace("a,s0,", "a,s2,"), resume=True)


def test_limits_leave_the_rest_for_a_resume(place: Path) -> None:
    table = "name,images,priority\na,s0,\nb,s1,2\nc,s2,1\n"
    result = train(place, table, "fleet.max_subjects=1")
    assert (result.exit_reason, result.completed, result.remaining) == ("limit", 1, 2)
    assert [row.status for row in result.rows] == ["waiting", "completed", "waiting"]
    result = train(place, table, "fleet.max_subjects=1", resume=True)
    assert [row.status for row in result.rows] == ["waiting", "completed", "completed"]
    result = train(place, table, "fleet.max_hours=1e-9", resume=True)
    assert (result.exit_reason, result.completed) == ("limit", 2)
    assert train(place, table, resume=True).exit_reason == "completed"


def test_class_images_and_their_latents_are_made_once(place: Path) -> None:
    prior = [
        "method.with_prior_preservation=true",
        "method.num_class_images=2",
        "method.prior_generation_steps=1",
        "scaling.slots_per_worker=2",
    ]
    result = train(place, "name,images,class_prompt\na,s0,a cat\nb,s1,a cat\nc,s2,a dog\n", *prior)
    assert result.failed == 0
    classes = sorted(path.name for path in (place / "fleet/classes").iterdir())
    assert [name.rpartition("-")[0] for name in classes] == ["a-cat", "a-dog", ""]
    assert all(len(list((place / "fleet/classes" / name).glob("*.png"))) == 2 for name in classes[:2])
    logs = {path.parent.name: path.read_text() for path in (place / "fleet/subjects").glob("*/run.log")}
    for work in ("generating 2 class images", "encoding 2 class images"):
        assert [name for name in sorted(logs) if work in logs[name]] == ["a", "c"]


def test_rows_may_be_given_in_python(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    rows = [{"name": "a", "images": ["s0/000.png", "s1/001.png"], "train": {"max_train_steps": 1}}]
    result = fleet(rows, place / "recipe.yaml")
    assert [(row.name, row.status, row.steps) for row in result.rows] == [("a", "completed", 1)]
    assert "a" in result._repr_html_()


def test_errors_of_the_table_and_of_the_recipe_are_reported_together(place: Path) -> None:
    judge = ("validation.metrics=[clip_i]", "validation.prompts=[a cat]", "validation.clip=/nowhere/clip")
    with pytest.raises(UserError) as caught:
        train(place, "name,images,train.seed\na,nothing,-1\n", *judge)
    for part in ("row 2: train.seed", "nothing does not exist", "validation.clip: /nowhere/clip"):
        assert part in str(caught.value)
    assert not (place / "fleet").exists()
