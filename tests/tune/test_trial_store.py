"""The trial store: ranking, result files, resume, and errors that all trials share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from searches import RATES, make_recipe, make_tree, make_trials

from dreamfleet.datasets.errors import CheckpointError, DataError, RecipeError, ResourceError
from dreamfleet.trainers.recipe import Recipe, build_recipe, load_recipe
from dreamfleet.tune.open_search import open_store
from dreamfleet.tune.results import write_best, write_table
from dreamfleet.tune.trial_store import Trial, TrialStore, common_error, read_store


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


def test_trials_rank_by_their_best_rounds() -> None:
    store = TrialStore(make_recipe(), make_trials())
    assert [trial.name[-1] for trial in store.ranking()][:3] == ["1", "0", "2"]
    assert store.best is store.trials[1]
    assert TrialStore(make_recipe(), store.trials[2:]).best is store.trials[2]
    assert TrialStore(make_recipe(), store.trials[3:]).best is None  # step 0 measures the untuned model
    store.trials[0].rounds += [
        {"step": 30, "holdout_loss": 0.1, "clip_i": 0.6},
        {"step": 40, "holdout_loss": 0.7, "clip_i": 0.9},
        {"step": 50, "holdout_loss": float("nan")},
    ]
    assert store.best is store.trials[0]
    assert (store.best.figure("holdout_loss"), store.best.figure("clip_i")) == (0.1, 0.6)
    assert (store.best.best_step, store.best.steps) == (30, 50)
    store.trials[0].status = "failed"  # it would fail again
    assert store.best is store.trials[1] and store.ranking()[2] is store.trials[0]
    maximised = TrialStore(make_recipe(mode="max"), make_trials())
    assert maximised.best is maximised.trials[2] and maximised.best.best_step == 10


def with_scores(folder: Path | str = "runs/x", **section: Any) -> TrialStore:
    """Return a store of trials with two metrics, of which the second is maximised."""
    tree = make_tree(folder, metric=["holdout_loss", "clip_i"], **section)
    tree["validation"] |= {"prompts": ["a <x>"], "metrics": ["clip_i"]}
    store = TrialStore(build_recipe(tree))
    for loss, score in [(0.3, 0.5), (0.4, 0.7), (0.5, 0.6), (0.2, 0.4), (0.2, None)]:
        rate = 1e-3 * (1 + len(store.trials))
        trial = store.add({"optimizer.learning_rate": rate, "method.num_vectors": 1})
        trial.add_round({"step": 10, "holdout_loss": loss, "clip_i": score})
        trial.status = "completed"
    return store


def test_several_metrics_give_a_pareto_front() -> None:
    """Trial 2 is surpassed by trial 1 in both metrics, trial 4 has only one of them."""
    store = with_scores()
    assert [trial.name[-1] for trial in store.front()] == ["3", "0", "1"]
    store.trials[3].status = "failed"
    assert [trial.name[-1] for trial in store.front()] == ["0", "1"]
    assert [trial.name[-1] for trial in TrialStore(make_recipe(), make_trials()).front()] == ["1"]


def test_the_best_recipe_lists_the_recipes_of_the_front(tmp_path: Path) -> None:
    store = with_scores(tmp_path / "s")
    write_best(store)
    text = (tmp_path / "s" / "best.yaml").read_text()
    assert "front/trial-001.yaml" in text and "clip_i 0.7" in text and "trial-002" not in text
    listed = sorted(path.name for path in (tmp_path / "s" / "front").iterdir())
    assert listed == ["trial-000.yaml", "trial-001.yaml", "trial-003.yaml"]
    assert load_recipe(tmp_path / "s" / "front" / "trial-001.yaml").optimizer.learning_rate == 2e-3
    store.trials[1].status = "failed"
    write_best(store)
    assert not (tmp_path / "s" / "front" / "trial-001.yaml").exists()
    write_table(store)
    rows = pyarrow.parquet.read_table(tmp_path / "s" / "trials.parquet").to_pylist()
    assert [row["on_front"] for row in rows] == [True, False, True, True, False]
    assert [row["clip_i"] for row in rows] == [0.5, 0.7, 0.6, 0.4, None]


def test_the_state_of_a_search_is_stored(tmp_path: Path) -> None:
    """Two sessions of 5 and 7 seconds; trials end in another order than they start."""
    now = [100.0]
    store = TrialStore(make_recipe(tmp_path / "s"), clock=lambda: now[0])
    first, second = (store.add({"optimizer.learning_rate": rate}) for rate in (1e-3, 2e-3))
    store.record(first, {"step": 10, "holdout_loss": 0.5})
    store.record(first, {"step": 20, "holdout_loss": 0.4})
    store.record(first, {"step": 10, "holdout_loss": 0.3})
    now[0] += 5
    store.end(second, "failed", error="NaN", kind="RunFailed")
    store.end(first, "interrupted")
    again = read_store(store.recipe)
    assert again.trials == store.trials and [trial.ended for trial in again.trials] == [None, 1]
    assert again.trials[0].rounds == [{"step": 10, "holdout_loss": 0.3}]
    again._clock, again._since = (lambda: now[0]), now[0]
    now[0] += 7
    again.start(again.trials[0])
    again.end(again.trials[0], "completed")
    assert again.trials[0].ended == 2 and read_store(store.recipe).state.seconds == 12


def test_the_table_has_one_row_per_trial(tmp_path: Path) -> None:
    store = TrialStore(make_recipe(tmp_path / "s"), make_trials())
    write_table(store)
    table = pyarrow.parquet.read_table(tmp_path / "s" / "trials.parquet")
    rows = table.to_pylist()
    assert [row["status"] for row in rows] == [trial.status for trial in store.trials]
    assert rows[1] == {
        "trial": "trial-001",
        "status": "completed",
        "optimizer.learning_rate": 2e-3,
        "method.num_vectors": 2,
        "objective": 0.3,
        "holdout_loss": 0.3,
        "best_step": 20,
        "steps": 20,
        "seconds": 3.5,
        "gpu_seconds": 0.0,
        "on_front": True,
        "kept": True,
        "run_folder": str(tmp_path / "s" / "trials" / "trial-001"),
        "error": None,
    }
    assert rows[4]["objective"] is None and "number" in rows[4]["error"]
    store.trials[0].point["method.num_vectors"] = "many"  # a key with both text and numbers
    write_table(store)


def test_the_best_recipe_has_the_workers_of_the_search(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "s")
    write_best(TrialStore(recipe, make_trials()))
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
    seed, vectors = (
        r"search\.seed: there 0, here 5",
        r"search\.space\.method\.num_vectors: there .*, here null",
    )
    with pytest.raises(CheckpointError, match=rf"\({seed}, {vectors}\)"):
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
