"""Tests of learning rates: schedules equal diffusers'; rule and webui strings are checked with the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers.optimization import SchedulerType, get_scheduler

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.config.learning_rate import last_step, parse_rules, parse_webui_schedule
from dreamfleet.trainers.config.optimizer import OptimizerConfig
from dreamfleet.trainers.optim.optimizers import make_rates
from dreamfleet.trainers.optim.param_group import ParamGroup
from dreamfleet.trainers.optim.schedules import SCHEDULES, make_multiplier, make_rate
from dreamfleet.trainers.recipe import build_recipe, load_recipe

RULES = "1:10,0.1:20,0.005"


def our_rates(steps: int, **options: Any) -> list[float]:
    config = OptimizerConfig(**options)
    group = ParamGroup("unet", {"weight": torch.nn.Parameter(torch.zeros(1))})
    rate = make_rates([group], config, total_steps=steps, global_batch=8)["unet"]
    return [rate(step) for step in range(steps)]


def their_rates(name: str, steps: int, rate: float, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    schedule = get_scheduler(name, optimizer, num_training_steps=steps, **options)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def test_every_schedule_of_diffusers_is_supported() -> None:
    assert set(SCHEDULES) == {kind.value for kind in SchedulerType}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 7, 80])  # the last is longer than the run
@pytest.mark.parametrize("cycles", [None, 1, 3])
@pytest.mark.parametrize("rate", [5e-6, 1e-2])
def test_rates_equal_those_of_diffusers_at_every_step(
    name: str, warmup: int, cycles: int | None, rate: float
) -> None:
    """Test with all options set, as in files of diffusers and kohya, also those that a schedule ignores."""
    given = {} if cycles is None else {"lr_scheduler_num_cycles": cycles}
    ours = our_rates(
        50,
        learning_rate=rate,
        lr_scheduler=name,
        lr_warmup_steps=warmup,
        lr_power=2.0,
        lr_rules=RULES,
        **given,
    )
    theirs = their_rates(
        name, 50, rate, num_warmup_steps=warmup, num_cycles=cycles or 1, power=2.0, step_rules=RULES
    )
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-15)


def test_a_cosine_with_one_cycle_ends_at_zero() -> None:
    rates = our_rates(100, learning_rate=1.0, lr_scheduler="cosine", lr_num_cycles=1)
    assert rates[50] == pytest.approx(0.5) and rates[-1] < 1e-3 and rates == sorted(rates, reverse=True)


def test_scaled_rates_end_at_those_of_diffusers() -> None:
    ours = our_rates(20, learning_rate=1e-6, scale_lr=True, lr_scheduler="polynomial")
    assert ours == pytest.approx(their_rates("polynomial", 20, 8e-6, num_warmup_steps=0), rel=1e-9)


@pytest.mark.parametrize(
    "rules",
    ["", "x", "1:2,0.1:six,0.005", "1:2,", "1:2;0.1", "1:2,0.1:2,0.5", "1:0,2", "1:2,nan", "1:2,-1",
     "inf", "1:2.5,1", "1,0.5", "1:2,0.1:-3,1"],
)  # fmt: skip
def test_rules_are_validated_when_the_recipe_is_read(tmp_path: Path, rules: str) -> None:
    optimizer = {"lr_scheduler": "piecewise_constant", "lr_rules": rules}
    with pytest.raises(RecipeError, match=r"optimizer\.lr_rules.*1:10,0\.1:20,0\.005"):
        build_recipe(tiny.make_recipe(tmp_path, optimizer=optimizer))


def test_rules_may_have_any_order_and_spaces() -> None:
    assert parse_rules("0.1:5, 1:3 ,0.01") == [(1, 3), (0.1, 5), (0.01, None)]
    multiplier = make_multiplier("piecewise_constant", warmup=0, total=9, rules="0.1:5, 1:3 ,0.01")
    assert [multiplier(step) for step in range(7)] == [1, 1, 1, 0.1, 0.1, 0.01, 0.01]


def test_webui_strings() -> None:
    rate = make_rate("0.005:100, 1e-3:1000, 1e-5", lambda step: 99.0)
    assert [rate(s) for s in (0, 99, 100, 999, 1000, 5000)] == [0.005, 0.005, 1e-3, 1e-3, 1e-5, 1e-5]
    assert last_step("0.005:100, 1e-3:1000") == 1000 and last_step("0.005:100, 1e-3") is None
    assert last_step("0.005:100, 1e-3:-1") is None and last_step(1e-4) is None


@pytest.mark.parametrize(
    "wrong", ["abc", "0.1:x", "0.1:20,0.2:10", "0.1,0.2", "-1:5", "nan", "0.1:0", "0.1:5,0.2:-5"]
)
@pytest.mark.parametrize("name", ["learning_rate", "text_encoder_lr"])
def test_webui_strings_are_validated_when_the_recipe_is_read(tmp_path: Path, wrong: str, name: str) -> None:
    with pytest.raises(RecipeError):
        parse_webui_schedule(wrong)
    with pytest.raises(RecipeError, match=f"optimizer.{name}"):
        build_recipe(tiny.make_recipe(tmp_path, optimizer={name: wrong}))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"learning_rate": "0.1:10,0.2", "lr_scheduler": "cosine"}, "needs lr_scheduler"),
        ({"learning_rate": "0.1:10,0.2", "scale_lr": True}, "scale_lr"),
        ({"text_encoder_lr": "0.1:10,0.2", "scale_lr": True}, "scale_lr"),
        ({"learning_rate": 1e-8, "lr_scheduler": "polynomial"}, "polynomial ends"),
    ],
)
def test_options_that_conflict_with_a_schedule_are_errors(
    tmp_path: Path, optimizer: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipe(tiny.make_recipe(tmp_path, optimizer=optimizer))


PAIRS = [
    ("max_train_steps", 10, "num_train_epochs", 2),
    ("max_train_steps", 10, "max_train_epochs", 2),
    ("max_train_steps", 10, "epoch", 2),
    ("checkpointing_steps", 10, "save_every_n_epochs", 2),
    ("save_every_n_steps", 500, "save_every_n_epochs", 1),
    ("batch_size", 2, "train_batch_size", 2),
    ("snr_gamma", 5, "min_snr_gamma", 5),
    ("ip_noise_gamma", 0.1, "input_perturbation", 0.1),
    ("timestep_sampling", "cosmap", "timestep_bias_strategy", "later"),
]


@pytest.mark.parametrize(("one", "first", "other", "second"), PAIRS)
def test_two_keys_for_one_setting_are_an_error(
    tmp_path: Path, one: str, first: Any, other: str, second: Any
) -> None:
    tree = tiny.make_recipe(tmp_path, train={one: first, other: second})
    with pytest.raises(RecipeError, match=r"both|the same key"):
        build_recipe(tree)


def test_an_override_error_names_how_to_remove_the_other_key(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path / "r.yaml", tiny.make_recipe(tmp_path))
    with pytest.raises(RecipeError, match=r"train\.max_train_steps=null"):
        load_recipe(path, ["train.num_train_epochs=3"])
    train = load_recipe(path, ["train.num_train_epochs=3", "train.max_train_steps=null"]).train
    assert (train.max_train_steps, train.num_train_epochs) == (None, 3)
    with pytest.raises(RecipeError, match=r"train\.checkpointing_steps=null"):
        load_recipe(path, ["train.save_every_n_epochs=1"])


def test_a_resolved_recipe_reads_back_with_either_key(tmp_path: Path) -> None:
    for train in ({"num_train_epochs": 2, "save_every_n_epochs": 1}, {"max_train_steps": 4}):
        recipe = build_recipe(tiny.make_recipe(tmp_path, train=train))
        assert build_recipe(recipe.model_dump(mode="json")) == recipe
