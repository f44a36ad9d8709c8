"""Tests the plan of a recipe on a cluster, and the command that prints it."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dreamfleet.cluster import cli as program
from dreamfleet.cluster.cli.cluster_plan import cluster_lines
from dreamfleet.trainers.memory.plan import plan_memory
from dreamfleet.trainers.memory.profile import method_without_weights
from dreamfleet.trainers.recipe import Recipe, load_recipe
from dreamfleet.trainers.scale.cluster import Cluster, parse_cluster
from dreamfleet.trainers.scale.communication import Sizes
from dreamfleet.trainers.scale.plan import count_flops, plan_cluster, predict
from dreamfleet.trainers.scale.recovery import Costs

COSTS = Costs(save=1.0, background=10.0, restart=60.0, regroup=5.0)


def load(root: Path, *overrides: str) -> Recipe:
    return load_recipe(root / "recipes" / "cat-lora.yaml", ["engine.zero_stage=auto", *overrides])


def test_sizes_and_costs_are_those_of_the_recipe(root: Path) -> None:
    recipe = load(root, "train.train_batch_size=3", "train.gradient_accumulation_steps=2")
    memory = plan_memory(recipe)
    cluster = parse_cluster("16xA100@100Gb,storage=1MB,restart=10s,regroup=2s")
    plan = plan_cluster(recipe, cluster, memory)
    assert plan.sizes.trained == memory.counts.total and plan.sizes.micros == 2 and plan.sizes.images == 6
    # Weights and two moments of Adam in float32, and the headers of the files.
    assert 12 * memory.counts.total < plan.checkpoint_bytes < 13 * memory.counts.total + 500_000
    assert plan.costs.save == pytest.approx(plan.checkpoint_bytes / 25e9)
    assert plan.costs.background == pytest.approx(plan.checkpoint_bytes / 1e6)
    assert plan.costs.restart == pytest.approx(10 + (memory.counts.model + plan.checkpoint_bytes) / 1e6)
    assert [one.engine for one in plan.engines] == ["torch", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    shown = "\n".join(cluster_lines(plan))
    assert all(part in shown for part in ("16 A100, 2 nodes of 8; 100 Gb/s", "ZeRO-3", "512", "75 d"))


def test_operations_grow_with_the_batch(root: Path) -> None:
    one, three = (load(root, f"train.train_batch_size={number}") for number in (1, 3))
    single = count_flops(one, method_without_weights(one))  # type: ignore[arg-type]
    assert single > 1e8
    assert count_flops(three, method_without_weights(three)) == 3 * single  # type: ignore[arg-type]


def test_survivors_need_a_second_node() -> None:
    """With one node a failure restarts torch as it does ZeRO; with two it costs the regrouping alone."""
    sizes = Sizes(trained=10**6, flops=1e12)
    for gpus, keeps in ((8, False), (16, True)):
        cluster = Cluster(gpus, mtbf=1e4 * gpus / 8, step=1.0)  # a failure every 1e4 s in both
        torch, first, *_ = predict(
            cluster, sizes, COSTS, checkpoint_bytes=1, steps=100, recipe_interval=100, numbers=()
        ).engines
        assert (torch.share > first.share) == keeps
        saved = torch.chosen_interval / (torch.chosen_interval + 1)
        assert not keeps or torch.share == pytest.approx(saved * math.exp(-5 / 1e4))


def test_steps_take_their_expected_time() -> None:
    cluster = Cluster(1, mtbf=math.inf, step=2.0)
    plan = predict(
        cluster, Sizes(10**6), COSTS, checkpoint_bytes=1, steps=50, recipe_interval=10, numbers=(1, 2)
    )
    assert plan.engines[0].wall == pytest.approx(50 * 2 + 5 * 1.0)  # five saves of a second
    assert [one.gpus for one in plan.growth] == [1, 2]
    assert json.dumps(plan.to_json(), allow_nan=False)  # infinite times are null


def test_the_command_prints_the_cluster(root: Path) -> None:
    words = ["plan", str(root / "recipes" / "cat-lora.yaml"), "--cluster"]
    refused = CliRunner().invoke(program.app, [*words, "64xH100@fast"])
    assert refused.exit_code == 2 and "link" in refused.stderr and "400Gb" in refused.stderr
    shown = CliRunner().invoke(program.app, [*words, "64xH100@400Gb", "--json"])
    assert shown.exit_code == 0, shown.output
    answer = json.loads(shown.stdout)["cluster"]
    assert answer["cluster"]["nodes"] == 8 and len(answer["engines"]) == 4
