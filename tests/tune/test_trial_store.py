"""The trial store: ranking, result files, resume, and errors that all trials share."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet
import pytest
from searches import RATES, make_recipe, make_tree, make_trials

from dreamfleet.datasets.errors import CheckpointError, DataError, RecipeError, ResourceError
from dreamfleet.trainers.recipe import Recipe, build_recipe, load_recipe
from dreamfleet.tune.trial_store import Trial, TrialStore, common_error, open_store


def failures(count: int, kind: str = "DataError", error: str = "trial-{} is cut short") -> list[Trial]:
    names = [f"trial-{number:03d}" for number in range(count)]
    return [Trial(name, {}, "failed", [], 1.0, error.format(name[-3:]), kind) for name in names]


@pytest.mark.parametrize(
    ("trials", "kind"),
    [
        (failures(3), DataError),
        (failures(2), None),
        (failures(1), None),
        ([*failures(2), *failures(1, error="something else")], None),
        ([*failures(2), *failures(1, "RecipeError")], None),
        (failures(6, "RunFailed"), None),  # a failure of the run itself does not end the search
        (failures(5, "ResourceError"), None),
        (failures(6, "ResourceError"), ResourceError),
        ([*failures(3), Trial("trial-003", {}, rounds=[{"step": 0}])], None),
        ([*failures(3), Trial("trial-003", {})], DataError),
    ],
)
def test_an_error_that_the_first_trials_share_is_common(trials: list[Trial], kind: type | None) -> None:
    error = common_error(trials, planned=20)
    assert type(error) is (kind or type(None))


def test_an_error_of_all_trials_of_a_small_search_is_common() -> None:
    assert isinstance(common_error(failures(1), planned=1), DataError)
    assert common_error(failures(1), planned=2) is None


def test_completed_trials_rank_before_stopped_ones() -> None:
    store = TrialStore(make_recipe(), make_trials())
    assert [trial.name[-1] for trial in store.ranking()][:3] == ["1", "0", "2"]
    assert store.best is store.trials[1]
    assert TrialStore(make_recipe(), store.trials[2:]).best is store.trials[2]
    assert TrialStore(make_recipe(), store.trials[3:]).best is None  # step 0 measures the untuned model
    maximised = TrialStore(make_recipe(mode="max"), make_trials())
    assert maximised.best is maximised.trials[0]


def test_the_table_has_one_row_per_trial(tmp_path: Path) -> None:
    store = TrialStore(make_recipe(tmp_path / "s"), make_trials())
    store.write_table()
    table = pyarrow.parquet.read_table(tmp_path / "s" / "trials.parquet")
    rows = table.to_pylist()
    assert [row["status"] for row in rows] == [trial.status for trial in store.trials]
    assert rows[1] == {
        "trial": "trial-001",
        "status": "completed",
        "optimizer.learning_rate": 2e-3,
        "method.num_vectors": 2,
        "objective": 0.3,
        "clip_i": None,
        "steps": 20,
        "seconds": 3.5,
        "run_folder": str(tmp_path / "s" / "trials" / "trial-001"),
        "error": None,
    }
    assert rows[4]["objective"] is None and "number" in rows[4]["error"]
    store.trials[0].point["method.num_vectors"] = "many"  # a key with both text and numbers
    store.write_table()


def test_the_best_recipe_has_the_workers_of_the_search(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "s")
    TrialStore(recipe, make_trials()).write_best()
    best = load_recipe(tmp_path / "s" / "best.yaml")
    assert (best.optimizer.learning_rate, best.method.num_vectors) == (2e-3, 2)
    assert best.scaling == recipe.scaling and best.search is None
    assert best.output_dir == str(tmp_path / "s" / "best")


def test_a_search_is_resumed_on_request_and_only_if_it_is_the_same_search(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "s")
    store = open_store(recipe, resume=False)
    store.trials = make_trials()
    store.save()
    store.folder.write_text("search.yaml", recipe.to_yaml())
    with pytest.raises(RecipeError, match="--resume"):
        open_store(recipe, resume=False)
    more = make_recipe(tmp_path / "s", num_trials=20, scheduler="none", max_concurrent_trials=1)
    assert open_store(more, resume=True).trials == store.trials
    other = make_recipe(tmp_path / "s", seed=5, space={"optimizer.learning_rate": RATES})
    with pytest.raises(CheckpointError, match=r"search\.seed, search\.space\.method\.num_vectors"):
        open_store(other, resume=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    with pytest.raises(RecipeError, match="holds no search"):
        open_store(make_recipe(tmp_path / "run"), resume=True)


def test_a_resubmitted_search_accepts_its_images_under_another_package_path(tmp_path: Path) -> None:
    def in_package(session: str, package: str, images: str) -> Recipe:
        tree = make_tree(tmp_path / "s")
        tree["data"]["instance_data_dir"] = (
            f"/tmp/ray/{session}/working_dir_files/_ray_pkg_{package}/inputs/{images}"
        )
        return build_recipe(tree)

    store = open_store(in_package("session_1", "0a1b", "cat"), resume=False)
    store.save()
    store.folder.write_text("search.yaml", store.recipe.to_yaml())
    open_store(in_package("session_2", "77ff", "cat"), resume=True)
    with pytest.raises(CheckpointError, match=r"data\.instance_data_dir"):
        open_store(in_package("session_2", "77ff", "dog"), resume=True)
