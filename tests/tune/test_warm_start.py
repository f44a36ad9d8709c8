"""Earlier searches, from whose results a new search learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from searches import RATES, make_recipe, make_tree, make_trials

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.tune.open_search import open_store
from dreamfleet.tune.trial_store import TrialStore
from dreamfleet.tune.warm_start import describe_earlier


def earlier_search(folder: Path, **section: Any) -> str:
    """Write a search with results; return its folder."""
    return store_search(make_recipe(folder, **section))


def store_search(recipe: Recipe) -> str:
    store = TrialStore(recipe, make_trials())
    store.trials[3].rounds.append({"step": 10, "holdout_loss": 0.2})  # an interrupted one
    store.trials[4].rounds.append({"step": 10, "holdout_loss": 0.2})  # one that failed
    store.save()
    store.folder.write_text("search.yaml", recipe.to_yaml())
    return recipe.output_dir


def test_finished_trials_inside_the_space_are_used(tmp_path: Path) -> None:
    """Of the five trials three finished; one of these lies outside the narrower space."""
    tree = make_tree(tmp_path / "before")
    tree["train"]["max_train_steps"], tree["data"]["instance_data_dir"] = 50, "dogs"
    before = store_search(build_recipe(tree))
    space = {
        "optimizer.learning_rate": {**RATES, "lower": 1.5e-3},
        "method.num_vectors": make_tree()["search"]["space"]["method.num_vectors"],
    }
    recipe = make_recipe(tmp_path / "now", warm_start=[before], space=space)
    store = open_store(recipe, resume=False)
    found = [
        (trial.name, trial.point["optimizer.learning_rate"], trial.figures) for trial in store.state.earlier
    ]
    assert found == [("trial-001", 2e-3, {"holdout_loss": 0.3}), ("trial-002", 5e-2, {"holdout_loss": 0.6})]
    (line,) = describe_earlier(store)
    assert "2 trials" in line and "data.instance_data_dir, train.max_train_steps" in line
    store.save()
    store.folder.write_text("search.yaml", recipe.to_yaml())
    Path(before, "trials.json").unlink()
    again = open_store(recipe, resume=True)  # the earlier search is not needed any more
    assert again.state.earlier == store.state.earlier
    assert [line.endswith("/before") for line in describe_earlier(again)] == [True]


def test_searches_that_cannot_be_used_are_reported_together(tmp_path: Path) -> None:
    other = earlier_search(
        tmp_path / "other",
        space={
            "optimizer.learning_rate": RATES,
            "optimizer.adam_beta1": {"distribution": "uniform", "lower": 0.5, "upper": 0.9},
        },
    )
    tree = make_tree(tmp_path / "tuned")
    tree["method"] = {"name": "prompt_tuning", "placeholder_token": "<x>"}
    wrong_method = store_search(build_recipe(tree))
    tree = make_tree(
        tmp_path / "now", metric="clip_i", warm_start=[other, wrong_method, str(tmp_path / "nothing")]
    )
    tree["validation"] |= {"prompts": ["a <x>"], "metrics": ["clip_i"]}
    with pytest.raises(RecipeError) as caught:
        open_store(build_recipe(tree), resume=False)
    message = str(caught.value)
    assert "method.num_vectors, optimizer.adam_beta1" in message and "did not measure clip_i" in message
    assert "prompt_tuning, not of textual_inversion" in message and "nothing holds no search" in message
