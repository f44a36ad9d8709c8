"""The search without Ray's processes: points, the record of trials, the scheduler's memory, what a trial gets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import ray
import tiny
from searches import RATES, loss_at, make_recipe, make_tree, make_trials
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import CheckpointError, DataError, RecipeError, ResourceError
from dreamfleet.trainers.recipe import Recipe, build_recipe, load_recipe
from dreamfleet.tune.algorithm import SearchAlgorithm
from dreamfleet.tune.asha import make_scheduler
from dreamfleet.tune.callback import StoreCallback
from dreamfleet.tune.search import can_share_process, search, trial_room
from dreamfleet.tune.space import grid
from dreamfleet.tune.trial_store import Trial, TrialStore, common_error, format_trial, open_store


class Running:
    """What a scheduler sees of a trial."""

    def __init__(self, name: str):
        self.config = {"name": name}


def try_points(store: TrialStore, most: int) -> SearchAlgorithm:
    """Run the made-up objective on the next points, one after the other."""
    algorithm = SearchAlgorithm(store)
    for number in range(most):
        config = algorithm.suggest(str(number))
        if config == algorithm.FINISHED:
            break
        trial = store.trial(config["name"])
        trial.add_round({"step": 100, "holdout_loss": loss_at(trial.point)})
        trial.status = "completed"
        algorithm.on_trial_complete(str(number), result={"holdout_loss": loss_at(trial.point)})
    return algorithm


# ---- the points -----------------------------------------------------------------------------------------------------


def test_an_interrupted_search_tries_the_same_points_as_one_that_was_not() -> None:
    recipe = make_recipe(num_trials=9)
    straight = TrialStore(recipe)
    try_points(straight, 100)
    assert len(straight.trials) == 9
    first = TrialStore(recipe)
    try_points(first, 4).suggest("left in the middle")
    assert [trial.status for trial in first.trials] == ["completed"] * 4 + ["running"]
    second = TrialStore(recipe, [Trial(**json.loads(json.dumps(vars(trial)))) for trial in first.trials])
    try_points(second, 100)
    assert [trial.point for trial in second.trials] == [trial.point for trial in straight.trials]


def test_optuna_learns_from_the_trials() -> None:
    def mean_of_the_last(algorithm: str) -> float:
        store = TrialStore(make_recipe(num_trials=40, algorithm=algorithm))
        try_points(store, 100)
        losses = [loss_at(trial.point) for trial in store.trials[20:]]
        return sum(losses) / len(losses)

    assert mean_of_the_last("optuna") < 0.5 * mean_of_the_last("random")


def test_another_seed_gives_other_points() -> None:
    points = []
    for seed in (0, 1):
        store = TrialStore(make_recipe(seed=seed))
        try_points(store, 100)
        points.append([trial.point for trial in store.trials])
    assert points[0] != points[1]


def test_given_points_come_first_and_a_grid_in_its_order() -> None:
    wanted = {"optimizer.learning_rate": 2e-3, "method.num_vectors": 2}
    store = TrialStore(make_recipe(points_to_evaluate=[wanted]))
    try_points(store, 2)
    assert store.trials[0].point == wanted != store.trials[1].point
    recipe = make_recipe(
        space={
            "optimizer.learning_rate": {**RATES, "num": 4},
            "method.num_vectors": {"distribution": "lograndint", "lower": 1, "upper": 9, "num": 3},
        },
        algorithm="grid",
        num_trials=None,
    )
    assert recipe.search is not None
    points = grid(recipe.search)
    assert [point["method.num_vectors"] for point in points[:4]] == [1, 3, 9, 1]
    assert [point["optimizer.learning_rate"] for point in points[::3]] == pytest.approx(
        [1e-4, 1e-3, 1e-2, 1e-1]
    )
    store = TrialStore(recipe)
    try_points(store, 5)
    try_points(store, 100)
    assert [trial.point for trial in store.trials] == points
    assert try_points(store, 0).remaining == 0


def test_a_failed_trial_is_no_reason_to_stop() -> None:
    store = TrialStore(make_recipe())
    algorithm = SearchAlgorithm(store)
    for number in range(3):
        algorithm.suggest(str(number))
        store.trials[-1].status = "failed"
        algorithm.on_trial_complete(str(number), result={"error": "NaN"})
    assert algorithm.remaining == 3
    assert SearchAlgorithm(store).remaining == 3


def fail(count: int, kind: str = "DataError", error: str = "trial-{} is cut short") -> list[Trial]:
    names = [f"trial-{number:03d}" for number in range(count)]
    return [Trial(name, {}, "failed", [], 1.0, error.format(name[-3:]), kind) for name in names]


@pytest.mark.parametrize(
    ("trials", "kind"),
    [
        (fail(3), DataError),
        (fail(2), None),
        (fail(1), None),
        ([*fail(2), *fail(1, error="something else")], None),
        ([*fail(2), *fail(1, "RecipeError")], None),
        (fail(6, "RunFailed"), None),  # an accident of the run is a reason to go on
        (fail(5, "ResourceError"), None),
        (fail(6, "ResourceError"), ResourceError),
        ([*fail(3), Trial("trial-003", {}, rounds=[{"step": 0}])], None),
        ([*fail(3), Trial("trial-003", {})], DataError),
    ],
)
def test_a_mistake_of_the_first_trials_ends_the_search(trials: list[Trial], kind: type | None) -> None:
    mistake = common_error(trials, planned=20)
    assert type(mistake) is (kind or type(None))


def test_a_search_of_few_trials_ends_when_all_make_the_mistake() -> None:
    assert isinstance(common_error(fail(1), planned=1), DataError)
    assert common_error(fail(1), planned=2) is None


def test_a_trial_that_does_not_fit_is_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    store = TrialStore(make_recipe(tmp_path), make_trials()[:2])
    for trial in store.trials:
        trial.status, trial.rounds = "running", []
    told: list[str] = []
    callback = StoreCallback(store, lambda trial: told.append(format_trial(trial, ["holdout_loss"])))
    callback.planned = 6
    first, second = (Running(trial.name) for trial in store.trials)
    for running in (first, second):
        callback.on_trial_start(0, [], running)
    no_room = {
        "error": "the GPU ran out of memory",
        "kind": "ResourceError",
        "done": True,
        "time_total_s": 2.0,
    }
    callback.on_trial_result(0, [], first, no_room)
    callback.on_trial_result(
        0, [], second, {"step": 10, "holdout_loss": 0.5, "done": False, "time_total_s": 2.0}
    )
    assert callback.error is None and not (tmp_path / "STOP").exists()
    assert "ran out of memory" in told[2]
    (tmp_path / "search.yaml").write_text(store.recipe.to_yaml())
    read = open_store(store.recipe, resume=True).trials
    assert [(trial.status, trial.kind) for trial in read] == [("failed", "ResourceError"), ("running", None)]


@pytest.mark.parametrize(
    ("changes", "uses_gpu", "shared"),
    [
        ({}, False, True),
        ({}, True, False),  # `auto` may choose ZeRO there
        ({"engine": {"zero_stage": 3}}, False, False),
        ({"engine": {"zero_stage": 0}}, False, False),
        ({"engine": {"torch_compile": True}}, False, False),
        ({"engine": {"deepspeed_config": "ds.json"}}, False, False),
        ({"engine.zero_stage": {"distribution": "choice", "values": ["auto", 2]}}, False, False),
    ],
)
def test_only_trials_that_leave_nothing_behind_share_a_process(
    changes: dict[str, Any], uses_gpu: bool, shared: bool
) -> None:
    tree = make_tree()
    if "engine" in changes:
        tree["engine"] = changes["engine"]
    else:
        tree["search"]["space"] |= changes
    assert can_share_process(build_recipe(tree), uses_gpu=uses_gpu) is shared


# ---- the record -----------------------------------------------------------------------------------------------------


def test_only_trials_that_came_to_their_end_compete() -> None:
    store = TrialStore(make_recipe(), make_trials())
    assert [trial.name[-1] for trial in store.ranking()][:3] == ["1", "0", "2"]
    assert store.best is store.trials[1]
    assert TrialStore(make_recipe(), store.trials[2:]).best is store.trials[2]
    assert TrialStore(make_recipe(), store.trials[3:]).best is None  # the untuned model is nobody's merit
    most = TrialStore(make_recipe(mode="max"), make_trials())
    assert most.best is most.trials[0]


def test_the_table_has_a_row_a_trial(tmp_path: Path) -> None:
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
    store.trials[0].point["method.num_vectors"] = "many"  # a key that takes words and numbers
    store.write_table()


def test_the_best_recipe_runs_as_the_search_was_written(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "s")
    TrialStore(recipe, make_trials()).write_best()
    best = load_recipe(tmp_path / "s" / "best.yaml")
    assert (best.optimizer.learning_rate, best.method.num_vectors) == (2e-3, 2)
    assert best.scaling == recipe.scaling and best.search is None
    assert best.output_dir == str(tmp_path / "s" / "best")


def test_a_search_is_continued_only_when_asked_and_only_as_the_same_search(tmp_path: Path) -> None:
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


def test_a_search_that_is_submitted_again_finds_its_images_in_another_parcel(tmp_path: Path) -> None:
    def in_parcel(session: str, parcel: str, images: str) -> Recipe:
        tree = make_tree(tmp_path / "s")
        tree["data"]["instance_data_dir"] = (
            f"/tmp/ray/{session}/working_dir_files/_ray_pkg_{parcel}/inputs/{images}"
        )
        return build_recipe(tree)

    store = open_store(in_parcel("session_1", "0a1b", "cat"), resume=False)
    store.save()
    store.folder.write_text("search.yaml", store.recipe.to_yaml())
    open_store(in_parcel("session_2", "77ff", "cat"), resume=True)
    with pytest.raises(CheckpointError, match=r"data\.instance_data_dir"):
        open_store(in_parcel("session_2", "77ff", "dog"), resume=True)


def test_a_recipe_without_a_search_is_refused() -> None:
    tree = make_tree()
    del tree["search"]
    with pytest.raises(RecipeError, match="search:"):
        search(build_recipe(tree))


def test_the_command_tells_a_finished_search_again(tmp_path: Path) -> None:
    """There is nothing left to run, so no Ray is started for it."""
    tree = make_tree(tmp_path / "s", num_trials=5)
    tree["data"]["instance_data_dir"] = str(tiny.make_images(tmp_path / "pictures", 2))
    tree["validation"]["holdout"] = str(tiny.make_images(tmp_path / "holdout", 1))
    path = tiny.write_recipe(tmp_path / "r.yaml", tree)
    store = TrialStore(load_recipe(path), make_trials())
    store.trials[3].status = "stopped"
    store.save()
    store.folder.write_text("search.yaml", store.recipe.to_yaml())

    def tune(*words: str) -> Any:
        return CliRunner().invoke(program.app, ["tune", str(path), *words])

    done = tune("--resume")
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "s" / "report.html") in done.stdout
    assert re.search(r"trial-001 +0\.002 +2 +0\.3 +20", done.stdout)
    told = json.loads(tune("--resume", "--json").stdout)
    assert told["best"]["name"] == "trial-001" and len(told["trials"]) == 5
    again = tune()
    assert again.exit_code == 2 and "--resume" in again.stderr
    for trial in store.trials:
        trial.status, trial.error = "failed", "the loss is no longer a number"
    store.save()
    failed = tune("--resume")
    assert failed.exit_code == 1 and "all 5 trials failed" in failed.stderr
    for trial in store.trials:
        trial.error, trial.kind = "out of memory", "ResourceError"
    store.save()
    failed = tune("--resume")
    assert failed.exit_code == 2 and "out of memory" in failed.stderr
    store.trials[4].kind = "RunFailed"
    store.save()
    assert tune("--resume").exit_code == 1
    assert "out of memory" in (tmp_path / "s" / "report.html").read_text()
    assert not ray.is_initialized()


# ---- the scheduler --------------------------------------------------------------------------------------------------


def test_asha_remembers_the_trials_from_before() -> None:
    recipe = make_recipe(reduction_factor=2)
    lagging = {"step": 10, "holdout_loss": 0.8}
    decisions = []
    for trials in (make_trials()[:2], []):
        asha = make_scheduler(TrialStore(recipe, trials))
        asha.on_trial_add(None, Running("new"))
        assert asha.on_trial_result(None, Running("new"), {"step": 0, "holdout_loss": 0.9}) == asha.CONTINUE
        decisions.append(asha.on_trial_result(None, Running("new"), lagging))
    assert decisions == [asha.STOP, asha.CONTINUE]


def test_asha_does_not_judge_a_round_twice() -> None:
    """Trial 3 lags behind the others now, but they had not come so far when it passed."""
    trials = make_trials()[:4]
    trials[3].rounds.append({"step": 10, "holdout_loss": 0.8})
    asha = make_scheduler(TrialStore(make_recipe(reduction_factor=2), trials))
    asha.on_trial_add(None, Running("trial-003"))
    told = {"step": 10, "holdout_loss": 0.8}
    assert asha.on_trial_result(None, Running("trial-003"), told) == asha.CONTINUE


# ---- the machines ---------------------------------------------------------------------------------------------------

TWO_CPUS, WITH_GPUS = {"CPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("machine", "section", "resources", "threads", "at_once"),
    [
        (TWO_CPUS, {}, {"CPU": 1}, 1, 2),
        (TWO_CPUS, {"max_concurrent_trials": 1}, {"CPU": 1}, 2, 1),
        (TWO_CPUS, {"max_concurrent_trials": 4}, {"CPU": 0.5}, 1, 4),
        (TWO_CPUS, {"resources_per_trial": {"CPU": 0.5}}, {"CPU": 0.5}, 1, 4),
        (WITH_GPUS, {}, {"CPU": 1, "GPU": 1}, 8, 2),
        (WITH_GPUS, {"resources_per_trial": {"CPU": 2, "GPU": 0.5}}, {"CPU": 2, "GPU": 0.5}, 2, 4),
        (WITH_GPUS, {"max_concurrent_trials": 1}, {"CPU": 1, "GPU": 1}, 8, 1),
    ],
)
def test_what_a_trial_gets(
    machine: dict[str, float],
    section: dict[str, Any],
    resources: dict[str, float],
    threads: int,
    at_once: int,
) -> None:
    share, room = trial_room(make_recipe(**section), [machine])
    assert (share.resources, share.threads, room) == (resources, threads, at_once)


def test_a_trial_that_fits_nowhere_is_refused_before_anything_starts() -> None:
    with pytest.raises(ResourceError, match=r"3 CPU .*search\.resources_per_trial"):
        trial_room(make_recipe(resources_per_trial={"CPU": 3}), [TWO_CPUS, TWO_CPUS])
