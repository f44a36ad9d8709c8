"""Whole searches on Ray, on disk and in a bucket."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
import tiny
from searches import BAD, GOOD, HOPELESS, make_trained_recipe, make_trained_tree
from servers import S3Server, s3_server  # noqa: F401 - a fixture

from dreamfleet.datasets.errors import ModelError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.driver.session import RaySession, ray_session
from dreamfleet.trainers.launch import fit
from dreamfleet.trainers.recipe import build_recipe, load_recipe
from dreamfleet.tune.search import search
from dreamfleet.tune.trial_store import Trial


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    tiny.make_images(folder / "holdout", 2, seed=5)
    return folder


@pytest.fixture(scope="module")
def local_ray() -> Iterator[RaySession]:
    """One private Ray runtime for the tests of this file."""
    with ray_session() as session:
        yield session


def interrupt_after(count: int) -> Callable[[Trial], None]:
    """Return a progress callback that sends SIGINT to this process once ``count`` trials have ended."""
    over: set[str] = set()
    sent: list[bool] = []

    def on_progress(trial: Trial) -> None:
        if trial.is_over:
            over.add(trial.name)
        if len(over) >= count and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    return on_progress


@pytest.mark.cluster
def test_an_interrupted_search_is_resumed(folder: Path, local_ray: RaySession) -> None:
    """Good points complete, bad ones are stopped by the scheduler, hopeless ones fail."""
    recipe = make_trained_recipe(folder, "searched", [GOOD, BAD, HOPELESS], max_concurrent_trials=4)
    first = search(recipe, on_progress=interrupt_after(1))
    assert first.exit_reason == "interrupted" and first.best is not None
    before = {trial.name: trial for trial in first.trials if trial.is_over}
    assert 1 <= len(before) < 6
    assert not Storage(first.folder).exists("STOP")

    seen: list[str] = []
    result = search(recipe, resume=True, on_progress=lambda trial: seen.append(trial.name))
    assert result.exit_reason == "completed"
    assert not before.keys() & set(seen), "a finished trial ran again"
    trials = {trial.name: trial for trial in result.trials}
    assert all(
        (trials[name].status, trials[name].rounds, trials[name].seconds)
        == (trial.status, trial.rounds, trial.seconds)
        for name, trial in before.items()
    )
    by_rate = {
        rate: [t for t in trials.values() if t.point["optimizer.learning_rate"] == rate]
        for rate in (GOOD, BAD, HOPELESS)
    }
    assert {trial.status for trial in by_rate[GOOD]} <= {"completed", "stopped"}
    assert {trial.status for trial in by_rate[BAD]} == {"stopped"}
    assert {trial.status for trial in by_rate[HOPELESS]} == {"failed"}
    assert all("number" in str(trial.error) for trial in by_rate[HOPELESS])
    assert result.best is not None and result.best.point["optimizer.learning_rate"] == GOOD

    rows = pyarrow.parquet.read_table(result.table).to_pylist()
    assert len(rows) == 6 and all(Path(row["run_folder"], "metrics.jsonl").exists() for row in rows)
    for trial in (*by_rate[GOOD], *by_rate[BAD]):
        run = Storage(result.folder).child(trial.folder)
        assert json.loads(run.read_text("summary.json"))["steps"] >= trial.steps > 0
        assert run.exists("report.html")
        kept = bool(run.list_dirs("checkpoints")), bool(run.list("exports"))
        assert kept == ((True, True) if trial is result.best else (False, False))
    assert Path(result.report).read_text().count("<img") >= 4

    assert result.best_recipe is not None
    best = load_recipe(result.best_recipe)
    assert (
        best.scaling.num_workers == 1 and best.method.num_vectors == result.best.point["method.num_vectors"]
    )
    again = fit(result.best_recipe, overrides=["scaling.num_workers=0"], on_progress=lambda line: None)
    last = result.best.rounds[-1]["holdout_loss"]  # of a packed run
    assert again.summary.figures["holdout_loss"] == pytest.approx(last, rel=1e-5)


@pytest.mark.cluster
def test_an_error_that_all_trials_share_ends_the_search(folder: Path, local_ray: RaySession) -> None:
    """The model folder is empty, which only the trials detect."""
    (folder / "broken").mkdir()
    tree = make_trained_tree(folder, str(folder / "mistaken"), [GOOD, BAD])
    tree["model"]["pretrained_model_name_or_path"] = str(folder / "broken")
    with pytest.raises(ModelError, match="broken"):
        search(build_recipe(tree))
    assert not (folder / "mistaken").exists(), "the files of a search without trials remain"


@pytest.mark.cluster
@pytest.mark.s3
def test_a_search_in_a_bucket_is_resumed(
    folder: Path,
    local_ray: RaySession,
    s3_server: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3_server.set_environment(monkeypatch)
    address = s3_server.new_folder() + "/search"
    first = search(build_recipe(make_trained_tree(folder, address, [GOOD], num_trials=1)))
    second = search(build_recipe(make_trained_tree(folder, address, [GOOD], num_trials=2)), resume=True)
    assert [trial.name for trial in second.trials if trial.rounds == first.trials[0].rounds] == ["trial-000"]
    assert len(second.trials) == 2
    bucket = Storage(address)
    assert all(bucket.exists(name) for name in ("best.yaml", "trials.parquet", "report.html"))
    assert bucket.exists("trials/trial-001/summary.json")
    assert second.best_recipe is not None
    assert load_recipe(second.best_recipe).output_dir == f"{address}/best", (
        "the report names this recipe for training"
    )
