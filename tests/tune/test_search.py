"""A search without Ray processes: resources of trials, shared processes, and the command line."""

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
from dreamfleet.datasets.errors import RecipeError, ResourceError
from dreamfleet.trainers.recipe import build_recipe, load_recipe
from dreamfleet.tune.search import can_share_process, search, trial_room
from dreamfleet.tune.trial_store import TrialStore


@pytest.mark.parametrize(
    ("changes", "uses_gpu", "shared"),
    [
        ({}, False, True),
        ({}, True, False),  # `auto` may select ZeRO on a GPU
        ({"engine": {"zero_stage": 3}}, False, False),
        ({"engine": {"zero_stage": 0}}, False, False),
        ({"engine": {"torch_compile": True}}, False, False),
        ({"engine": {"deepspeed_config": "ds.json"}}, False, False),
        ({"engine.zero_stage": {"distribution": "choice", "values": ["auto", 2]}}, False, False),
    ],
)
def test_only_trials_without_lasting_process_state_share_a_process(
    changes: dict[str, Any], uses_gpu: bool, shared: bool
) -> None:
    tree = make_tree()
    if "engine" in changes:
        tree["engine"] = changes["engine"]
    else:
        tree["search"]["space"] |= changes
    assert can_share_process(build_recipe(tree), uses_gpu=uses_gpu) is shared


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
def test_resources_and_number_of_concurrent_trials(
    machine: dict[str, float],
    section: dict[str, Any],
    resources: dict[str, float],
    threads: int,
    at_once: int,
) -> None:
    share, room = trial_room(make_recipe(**section), [machine])
    assert (share.resources, share.threads, room) == (resources, threads, at_once)


def test_a_trial_that_fits_on_no_machine_is_an_error() -> None:
    with pytest.raises(ResourceError, match=r"3 CPU .*search\.resources_per_trial"):
        trial_room(make_recipe(resources_per_trial={"CPU": 3}), [TWO_CPUS, TWO_CPUS])
