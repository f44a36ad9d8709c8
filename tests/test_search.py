"""The search without Ray's processes: its section, the points, the record, the scheduler's memory, the report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import tiny
from PIL import Image

from dreamfleet.datasets.errors import CheckpointError, RecipeError, ResourceError
from dreamfleet.trainers.recipe import Recipe, build_recipe, load_recipe
from dreamfleet.tune.halving import make_scheduler
from dreamfleet.tune.ledger import Ledger, Trial, open_ledger
from dreamfleet.tune.plots import log_ticks
from dreamfleet.tune.proposals import Proposals
from dreamfleet.tune.report import render
from dreamfleet.tune.search import search, trial_room
from dreamfleet.tune.space import grid

RATES = {"distribution": "loguniform", "lower": 1e-4, "upper": 1e-1}
VECTORS = {"distribution": "choice", "values": [1, 2, 4]}


def make_tree(folder: Path | str = "runs/x", **section: Any) -> dict[str, Any]:
    space = {"optimizer.learning_rate": RATES, "method.num_vectors": VECTORS}
    return {
        "method": {"name": "textual_inversion", "placeholder_token": "<x>"},
        "data": {"instance_data_dir": "pictures"},
        "train": {"max_train_steps": 100},
        "validation": {"holdout": "holdout", "steps": 10},
        "scaling": {"num_workers": 2},
        "search": {"space": space, "num_trials": 6, **section},
        "output_dir": str(folder),
    }


def make_recipe(folder: Path | str = "runs/x", **section: Any) -> Recipe:
    return build_recipe(make_tree(folder, **section))


def loss_at(point: dict[str, Any]) -> float:
    """A made-up objective with its minimum at 2e-3 and two vectors."""
    return abs(point["optimizer.learning_rate"] / 2e-3 - 1) + abs(point["method.num_vectors"] - 2)


def try_points(ledger: Ledger, most: int) -> Proposals:
    """Run the made-up objective on the next points, one after the other."""
    proposals = Proposals(ledger)
    for number in range(most):
        config = proposals.suggest(str(number))
        if config == proposals.FINISHED:
            break
        trial = ledger.trial(config["name"])
        trial.add_round({"step": 100, "holdout_loss": loss_at(trial.point)})
        trial.status = "completed"
        proposals.on_trial_complete(str(number), result={"holdout_loss": loss_at(trial.point)})
    return proposals


# ---- the section ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"space": {"optimizer.learning_rte": RATES}}, "did you mean 'optimizer.learning_rate'?"),
        ({"space": {"optimizer.lr": RATES}}, "write it as 'optimizer.learning_rate' here"),
        ({"space": {"output_dir": VECTORS}}, "every trial has a folder of its own"),
        ({"space": {"data.resolution": VECTORS}}, "cannot be compared"),
        ({"space": {"validation.steps": VECTORS}}, "cannot be compared"),
        ({"space": {"scaling.num_workers": VECTORS}}, "a trial is one process"),
        ({"space": {}}, "search.space"),
        ({"space": {"method.num_vectors": {**VECTORS, "values": [1, 76]}}}, "less than or equal to 75 (got 76)"),
        (
            {"space": {"optimizer.adam_beta2": {"distribution": "uniform", "lower": 0.5, "upper": 1.5}}},
            "search.space.optimizer.adam_beta2: Input should be less than 1 (got 1.5)",
        ),
        (
            {"space": {"method.num_vectors": {"distribution": "uniform", "lower": 1, "upper": 5}}},
            "valid integer",
        ),
        ({"space": {"optimizer.learning_rate": {**RATES, "upper": 1e-4}}}, "must be over lower 0.0001"),
        ({"space": {"optimizer.learning_rate": {**RATES, "lower": 0}}}, "needs a lower over 0"),
        ({"space": {"optimizer.learning_rate": {**RATES, "lowr": 1}}}, "did you mean 'lower'?"),
        ({"space": {"method.num_vectors": {**VECTORS, "values": [2, 2]}}}, "twice"),
        ({"space": {"method.num_vectors": {**VECTORS, "lower": 1}}}, "choice takes values"),
        ({"space": {"method.num_vectors": {"distribution": "randint", "lower": 1, "upper": 2.5}}}, "whole number"),
        ({"num_trials": None}, "search.num_trials: missing"),
        ({"num_trals": 3}, "did you mean 'num_trials'?"),
        ({"algorithm": "grid"}, "a grid needs num"),
        ({"metric": "holdout_los"}, "did you mean 'holdout_loss'?"),
        ({"metric": "clip_i"}, "name it in validation.metrics"),
        ({"grace_period": 101}, "more than train.max_train_steps 100"),
        ({"resources_per_trial": {"GPU": 1.5}}, "0 to 1, or a whole number"),
        ({"points_to_evaluate": [{"method.num_vectors": 1}]}, "one value for each of"),
        (
            {"points_to_evaluate": [{"method.num_vectors": 3, "optimizer.learning_rate": 1}]},
            "method.num_vectors 3 lies outside",
        ),
        (
            {
                "space": {
                    "optimizer.learning_rate": {"distribution": "choice", "values": [1e-3, "0.1:10,0.01"]},
                    "optimizer.lr_scheduler": {"distribution": "choice", "values": ["constant", "cosine"]},
                }
            },
            "do not go together",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_told_when_the_recipe_is_read(section: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(**section)
    assert told in str(caught.value) and "search." in str(caught.value)


def test_a_search_by_held_out_loss_needs_held_out_pictures() -> None:
    tree = make_tree()
    del tree["validation"]
    with pytest.raises(
        RecipeError, match=r"search\.metric: validation measures nothing.*validation\.holdout"
    ):
        build_recipe(tree)


def test_scores_are_maximised_and_losses_minimised() -> None:
    tree = make_tree(metric="clip_i")
    tree["validation"] |= {"prompts": ["a <x>"], "metrics": ["clip_i"]}
    by_score = build_recipe(tree).search
    by_loss = make_recipe().search
    assert by_score and by_score.maximise and by_loss and not by_loss.maximise


def test_the_space_can_be_nested_and_changed_from_the_command_line(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path / "r.yaml", make_tree())
    changes = [
        "search.space.optimizer.learning_rate.lower=1e-5",
        "search.space.optimizer.adam_beta1={distribution: uniform, lower: 0.5, upper: 0.9}",
        "search.space.optimizer.adam_epsilon={distribution: choice, values: [1e-8, 1e-7]}",
    ]
    section = load_recipe(path, changes).search
    assert section is not None
    space = section.space
    assert space["optimizer.learning_rate"].lower == 1e-5
    assert space["optimizer.adam_beta1"].upper == 0.9
    assert space["optimizer.adam_epsilon"].values == [1e-8, 1e-7]


# ---- the points -----------------------------------------------------------------------------------------------------


def test_an_interrupted_search_tries_the_same_points_as_one_that_was_not() -> None:
    recipe = make_recipe(num_trials=9)
    straight = Ledger(recipe)
    try_points(straight, 100)
    assert len(straight.trials) == 9
    first = Ledger(recipe)
    try_points(first, 4).suggest("left in the middle")
    assert [trial.status for trial in first.trials] == ["completed"] * 4 + ["running"]
    second = Ledger(recipe, [Trial(**json.loads(json.dumps(vars(trial)))) for trial in first.trials])
    try_points(second, 100)
    assert [trial.point for trial in second.trials] == [trial.point for trial in straight.trials]


def test_optuna_learns_from_the_trials() -> None:
    def mean_of_the_last(algorithm: str) -> float:
        ledger = Ledger(make_recipe(num_trials=40, algorithm=algorithm))
        try_points(ledger, 100)
        losses = [loss_at(trial.point) for trial in ledger.trials[20:]]
        return sum(losses) / len(losses)

    assert mean_of_the_last("optuna") < 0.5 * mean_of_the_last("random")


def test_another_seed_gives_other_points() -> None:
    points = []
    for seed in (0, 1):
        ledger = Ledger(make_recipe(seed=seed))
        try_points(ledger, 100)
        points.append([trial.point for trial in ledger.trials])
    assert points[0] != points[1]


def test_given_points_come_first_and_a_grid_in_its_order() -> None:
    wanted = {"optimizer.learning_rate": 2e-3, "method.num_vectors": 2}
    ledger = Ledger(make_recipe(points_to_evaluate=[wanted]))
    try_points(ledger, 2)
    assert ledger.trials[0].point == wanted != ledger.trials[1].point
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
    ledger = Ledger(recipe)
    try_points(ledger, 5)
    try_points(ledger, 100)
    assert [trial.point for trial in ledger.trials] == points


def test_a_failed_trial_is_no_reason_to_stop() -> None:
    ledger = Ledger(make_recipe())
    proposals = Proposals(ledger)
    for number in range(3):
        proposals.suggest(str(number))
        ledger.trials[-1].status = "failed"
        proposals.on_trial_complete(str(number), result={"error": "NaN"})
    assert proposals.remaining == 3
    assert Proposals(ledger).remaining == 3


# ---- the record -----------------------------------------------------------------------------------------------------


def make_trials(metric: str = "holdout_loss") -> list[Trial]:
    def trial(number: int, rate: float, vectors: int, status: str, values: list[float]) -> Trial:
        rounds = [{"step": 10 * k, metric: value} for k, value in enumerate(values)]
        point = {"optimizer.learning_rate": rate, "method.num_vectors": vectors}
        return Trial(f"trial-{number:03d}", point, status, rounds, 3.5)

    failed = trial(4, 9e-2, 1, "failed", [])
    failed.error = "the loss is <no> number"
    return [
        trial(0, 1e-3, 1, "completed", [0.9, 0.5, 0.4]),
        trial(1, 2e-3, 2, "completed", [0.9, 0.4, 0.3]),
        trial(2, 5e-2, 4, "stopped", [0.9, 0.2]),
        trial(3, 2e-4, 4, "interrupted", [0.9]),
        failed,
    ]


def test_only_trials_that_came_to_their_end_compete() -> None:
    ledger = Ledger(make_recipe(), make_trials())
    assert [trial.name[-1] for trial in ledger.ranking()][:3] == ["1", "0", "2"]
    assert ledger.best is ledger.trials[1]
    assert Ledger(make_recipe(), ledger.trials[2:]).best is ledger.trials[2]
    assert Ledger(make_recipe(), ledger.trials[3:]).best is None  # the untuned model is nobody's merit
    most = Ledger(make_recipe(mode="max"), make_trials())
    assert most.best is most.trials[0]


def test_the_table_has_a_row_a_trial(tmp_path: Path) -> None:
    ledger = Ledger(make_recipe(tmp_path / "s"), make_trials())
    ledger.write_table()
    table = pyarrow.parquet.read_table(tmp_path / "s" / "trials.parquet")
    rows = table.to_pylist()
    assert [row["status"] for row in rows] == [trial.status for trial in ledger.trials]
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
    ledger.trials[0].point["method.num_vectors"] = "many"  # a key that takes words and numbers
    ledger.write_table()


def test_the_best_recipe_runs_as_the_search_was_written(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "s")
    Ledger(recipe, make_trials()).write_best()
    best = load_recipe(tmp_path / "s" / "best.yaml")
    assert (best.optimizer.learning_rate, best.method.num_vectors) == (2e-3, 2)
    assert best.scaling == recipe.scaling and best.search is None
    assert best.output_dir == str(tmp_path / "s" / "best")


def test_a_search_is_continued_only_when_asked_and_only_as_the_same_search(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "s")
    ledger = open_ledger(recipe, resume=False)
    ledger.trials = make_trials()
    ledger.save()
    ledger.folder.write_text("search.yaml", recipe.to_yaml())
    with pytest.raises(RecipeError, match="--resume"):
        open_ledger(recipe, resume=False)
    more = make_recipe(tmp_path / "s", num_trials=20, scheduler="none", max_concurrent_trials=1)
    assert open_ledger(more, resume=True).trials == ledger.trials
    other = make_recipe(tmp_path / "s", seed=5, space={"optimizer.learning_rate": RATES})
    with pytest.raises(CheckpointError, match=r"search\.seed, search\.space\.method\.num_vectors changed"):
        open_ledger(other, resume=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    with pytest.raises(RecipeError, match="holds no search"):
        open_ledger(make_recipe(tmp_path / "run"), resume=True)


def test_a_search_that_is_submitted_again_finds_its_pictures_in_another_parcel(tmp_path: Path) -> None:
    def in_parcel(session: str, parcel: str, pictures: str) -> Recipe:
        tree = make_tree(tmp_path / "s")
        tree["data"]["instance_data_dir"] = (
            f"/tmp/ray/{session}/working_dir_files/_ray_pkg_{parcel}/inputs/{pictures}"
        )
        return build_recipe(tree)

    ledger = open_ledger(in_parcel("session_1", "0a1b", "cat"), resume=False)
    ledger.save()
    ledger.folder.write_text("search.yaml", ledger.recipe.to_yaml())
    open_ledger(in_parcel("session_2", "77ff", "cat"), resume=True)
    with pytest.raises(CheckpointError, match=r"data\.instance_data_dir changed"):
        open_ledger(in_parcel("session_2", "77ff", "dog"), resume=True)


def test_a_recipe_without_a_search_is_refused() -> None:
    tree = make_tree()
    del tree["search"]
    with pytest.raises(RecipeError, match="no search: section"):
        search(build_recipe(tree))


# ---- the scheduler --------------------------------------------------------------------------------------------------


class Running:
    """What a scheduler sees of a trial."""

    def __init__(self, name: str):
        self.trial_id = name


def test_asha_remembers_the_trials_from_before() -> None:
    recipe = make_recipe(reduction_factor=2)
    lagging = {"step": 10, "holdout_loss": 0.8}
    decisions = []
    for trials in (make_trials()[:2], []):
        asha = make_scheduler(Ledger(recipe, trials))
        asha.on_trial_add(None, Running("new"))
        assert asha.on_trial_result(None, Running("new"), {"step": 0, "holdout_loss": 0.9}) == asha.CONTINUE
        decisions.append(asha.on_trial_result(None, Running("new"), lagging))
    assert decisions == [asha.STOP, asha.CONTINUE]


def test_no_trial_is_stopped_at_its_last_step() -> None:
    asha = make_scheduler(Ledger(make_recipe(reduction_factor=2), make_trials()[:2]))
    asha.on_trial_add(None, Running("new"))
    assert asha.on_trial_result(None, Running("new"), {"step": 100, "holdout_loss": 0.1}) == asha.CONTINUE


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
    with pytest.raises(ResourceError, match=r"3 CPU fits on no machine.*search\.resources_per_trial"):
        trial_room(make_recipe(resources_per_trial={"CPU": 3}), [TWO_CPUS, TWO_CPUS])


# ---- the report -----------------------------------------------------------------------------------------------------


def make_searched_folder(folder: Path, **section: Any) -> Ledger:
    ledger = Ledger(make_recipe(folder, **section), make_trials())
    for number, trial in enumerate(ledger.trials[:4]):
        samples = folder / trial.folder / "samples"
        samples.mkdir(parents=True)
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(samples / "step-000020.png")
        cell = {"prompt": "a <x>", "seed": 0, "row": 0, "column": 0, "width": 16, "height": 16}
        (samples / "step-000020.jsonl").write_text(json.dumps(cell))
    return ledger


def test_the_report_shows_the_trials_and_what_they_drew(tmp_path: Path) -> None:
    page = render(make_searched_folder(tmp_path / "my-search"))
    assert "my-search" in page and "2 completed" in page and "--resume" in page
    sheet = page[page.index("table class='sheet'") : page.index("</table>")]
    rows = sheet.split("<tr>")[2:]
    assert [row[4 : row.index("</th>")] for row in rows] == ["1", "2", "4"]
    assert sheet.count("<img") == 3  # two that ran to their end, one that was stopped
    assert sheet.count('class="best"') == 1 and "trial-001" in sheet.split('class="best"')[1]
    table = page[page.index("table class='trials'") :]
    assert table.count("<tr") == 6 and "the loss is &lt;no&gt; number" in table
    assert "trials/trial-001/report.html" in table
    assert "http" not in page.replace("http://www.w3.org", "")


def test_the_sheet_puts_many_rates_into_bins(tmp_path: Path) -> None:
    ledger = make_searched_folder(tmp_path / "s")
    for number in range(20):
        rate = 1e-4 * 10 ** (3 * number / 20)
        rounds = [{"step": 20, "holdout_loss": 1.0}]
        point = {"optimizer.learning_rate": rate, "method.num_vectors": 1}
        ledger.trials.append(Trial(f"more-{number}", point, "completed", rounds))
    page = render(ledger)
    head = page[page.index("<thead>") : page.index("</thead>")]
    assert head.count("<th>") == 7 and "1e-4 – 3.2e-4" in head and "best of 4" in page


def test_the_report_of_a_search_that_measured_nothing(tmp_path: Path) -> None:
    ledger = Ledger(make_recipe(tmp_path / "s"), make_trials()[4:])
    page = render(ledger)
    assert "1 failed" in page and "table class='sheet'" not in page
    assert "0 trials" in render(Ledger(make_recipe(tmp_path / "s")))


def test_a_runaway_loss_does_not_flatten_the_others(tmp_path: Path) -> None:
    ledger = make_searched_folder(tmp_path / "s")
    ledger.trials[2].rounds[-1]["holdout_loss"] = 1e6
    ticks = re.findall(r'class="y" style="[^"]*"><i>([^<]*)<', render(ledger))
    assert ticks and all(float(tick) < 2 for tick in ticks)


def test_words_are_a_row_of_their_own(tmp_path: Path) -> None:
    space = {
        "optimizer.lr_scheduler": {"distribution": "choice", "values": ["constant", "cosine"]},
        "data.random_flip": {"distribution": "choice", "values": [True, False]},
    }
    ledger = make_searched_folder(tmp_path / "s", space=space)
    for trial, word in zip(
        ledger.trials, ("constant", "cosine", "constant", "cosine", "cosine"), strict=True
    ):
        trial.point = {"optimizer.lr_scheduler": word, "data.random_flip": word == "cosine"}
    page = render(ledger)
    assert "lr_scheduler&nbsp;→" in page and "random_flip&nbsp;↓" in page


def test_log_ticks_are_round_and_few() -> None:
    assert log_ticks(9e-4, 2.1e-2) == pytest.approx([1e-3, 2e-3, 5e-3, 1e-2, 2e-2])
    assert log_ticks(1e-6, 1.0) == pytest.approx([10.0**k for k in range(-6, 1)])
