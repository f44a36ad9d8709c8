"""A search without Ray processes: the command line, and errors before anything starts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import ray
import tiny
from searches import make_recipe, make_tree, make_trials
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import RecipeError, ResourceError, UserError
from dreamfleet.trainers.recipe import build_recipe, load_recipe
from dreamfleet.tune.search import most_packed, search
from dreamfleet.tune.trial_store import TrialStore


def test_a_recipe_without_a_search_section_is_an_error() -> None:
    tree = make_tree()
    del tree["search"]
    with pytest.raises(RecipeError, match="search:"):
        search(build_recipe(tree))


def test_resuming_a_finished_search_prints_its_results(tmp_path: Path) -> None:
    """No trial remains, so Ray is not started."""
    tree = make_tree(tmp_path / "s", num_trials=5)
    tree["data"]["instance_data_dir"] = str(tiny.make_images(tmp_path / "images", 2))
    tree["validation"]["holdout"] = str(tiny.make_images(tmp_path / "holdout", 1))
    path = tiny.write_recipe(tmp_path / "r.yaml", tree)
    store = TrialStore(load_recipe(path), make_trials())
    store.trials[3].status = "stopped"
    store.save()
    store.folder.write_text("search.yaml", store.recipe.to_yaml())

    def tune(*options: str) -> Any:
        return CliRunner().invoke(program.app, ["tune", str(path), *options])

    done = tune("--resume")
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "s" / "report.html") in done.stdout
    assert re.search(r"trial-001 +0\.002 +2 +0\.3 +20", done.stdout)
    printed = json.loads(tune("--resume", "--json").stdout)
    assert printed["best"]["name"] == "trial-001" and len(printed["trials"]) == 5
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


@pytest.mark.parametrize(
    ("section", "total", "most"),
    [
        ({}, 16, 4),
        ({}, 5, 2),
        ({}, None, 8),
        ({"algorithm": "random"}, 16, None),
        ({"max_concurrent_trials": 9}, 16, None),
    ],
)
def test_optuna_waits_for_results_before_it_proposes_all_trials(
    section: dict[str, Any], total: int | None, most: int | None
) -> None:
    recipe = make_recipe(**section)
    assert recipe.search is not None and most_packed(recipe.search, total) == most


def test_a_trial_that_fits_on_no_machine_is_an_error_before_ray_starts(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "s", resources_per_trial={"CPU": 5000})
    tree["scaling"]["num_workers"] = 1
    tree["data"]["instance_data_dir"] = str(tiny.make_images(tmp_path / "images", 2))
    tree["validation"]["holdout"] = str(tiny.make_images(tmp_path / "holdout", 1))
    with pytest.raises(ResourceError, match=r"5000 CPU .*search\.resources_per_trial"):
        search(build_recipe(tree))
    assert not (tmp_path / "s").exists() and not ray.is_initialized()


def test_missing_images_and_missing_earlier_searches_are_reported_together(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "s", warm_start=[str(tmp_path / "earlier")])
    tree["data"]["instance_data_dir"] = str(tmp_path / "images")
    tree["validation"]["holdout"] = str(tiny.make_images(tmp_path / "holdout", 1))
    with pytest.raises(UserError) as caught:
        search(build_recipe(tree))
    for part in ("2 errors, nothing was started", f"{tmp_path}/images", f"{tmp_path}/earlier"):
        assert part in str(caught.value)
