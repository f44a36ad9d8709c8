"""Workers are killed, stopped and added while a run trains: the others continue, and the weights are equal."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
from elastic_members import Workers
from small_runs import assert_same, final_state, recipe_tree

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.report.events import read_events

CHANGES = {
    "train__train_batch_size": 1,
    "train__log_steps": 1,
    "engine": {"use_ema": True, "ema_decay": 0.9, "gradient_exchange": "unit"},
}
DONE = {"steps": 6, "reason": "completed"}


def make_tree(folder: Path, run: str, workers: int) -> dict[str, Any]:
    validation = {"holdout": str(folder / "holdout"), "steps": 3, "holdout_timesteps": 2}
    return recipe_tree(folder, run, **CHANGES, scaling={"num_workers": workers}, validation=validation)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """The final states and the lines of metrics of undisturbed runs, by the number of their workers."""
    found = {}
    for workers in (2, 3):
        folder = tmp_path_factory.mktemp(f"undisturbed-{workers}")
        tiny.make_images(folder / "holdout", 3, seed=5)
        tree = make_tree(folder, "run", workers)
        group = Workers(folder, tree, expected=workers)
        for rank in range(workers):
            group.start(rank)
        assert group.end() == [DONE | {"workers": workers}] * workers
        found[workers] = (final_state(tree), lines_of(tree))
    return found


def lines_of(tree: dict[str, Any]) -> list[tuple[int, float, bool]]:
    """Return the step and figure of each line of metrics, and whether it is that of a step."""
    lines = map(json.loads, Path(tree["output_dir"], "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line.get("loss", line.get("holdout_loss")), "loss" in line) for line in lines]


def make_group(folder: Path, workers: int, **options: Any) -> Workers:
    tiny.make_images(folder / "holdout", 3, seed=5)
    return Workers(folder, make_tree(folder, "run", workers), expected=workers, **options)


def check(group: Workers, undisturbed: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Check that weights and metrics are those of the undisturbed run; return the regroups."""
    state, lines = undisturbed
    assert_same(final_state(group.tree), state)
    assert [line[::2] for line in lines_of(group.tree)] == [line[::2] for line in lines]
    assert [line[1] for line in lines_of(group.tree)] == pytest.approx([line[1] for line in lines], rel=1e-5)
    return [event for event in read_events(Storage(group.tree["output_dir"])) if event["kind"] == "regroup"]


@pytest.mark.parametrize(
    ("rank", "where", "call", "step"),
    [(1, "backward", 8, 3), (0, "backward", 8, 3), (0, "save", 2, 3), (1, "evaluation", 2, 3)],
)
def test_a_survivor_continues_without_repeating_a_step(
    tmp_path: Path, undisturbed: dict[int, Any], rank: int, where: str, call: int, step: int
) -> None:
    group = make_group(tmp_path, 2)
    group.start(rank, where=where, call=call)
    group.start(1 - rank)
    assert group.end() == [DONE | {"workers": 1}]
    (regroup,) = check(group, undisturbed[2])
    assert regroup["step"] in (step, step + 1) if where == "save" else regroup["step"] == step
    assert (regroup["world"], regroup["mechanism"]) == (1, "survivors")
    assert f"worker {rank}" in regroup["cause"]


def test_a_worker_that_dies_while_the_run_starts_costs_a_new_start(
    tmp_path: Path, undisturbed: dict[int, Any]
) -> None:
    group = make_group(tmp_path, 2)
    group.start(1, where="evaluation", call=1)  # that of the untrained model
    group.start(0)
    assert group.end() == [DONE | {"workers": 1}]
    assert not check(group, undisturbed[2])


def test_a_killed_worker_is_replaced_by_one_that_gets_the_state_from_a_survivor(
    tmp_path: Path, undisturbed: dict[int, Any]
) -> None:
    group, joined = make_group(tmp_path, 3), tmp_path / "joined"
    group.start(0, where="backward", call=4)
    for rank in (1, 2):
        group.start(rank, held_at=3, held_until=str(joined))
    group.wait_for(lambda: len(group.generations) > 1)
    group.start(0)
    group.wait_for(lambda: any(member.ready for member in group.coordinator.roster.members.values()))
    joined.touch()
    assert group.end() == [DONE | {"workers": 3}] * 3
    shrunk, grown = check(group, undisturbed[3])
    assert (shrunk["world"], grown["world"]) == (2, 3)
    assert shrunk["step"] < grown["step"] < 6


def test_a_silent_worker_is_cut_off(tmp_path: Path, undisturbed: dict[int, Any]) -> None:
    group = make_group(tmp_path, 3, silence=2.0)
    group.start(0, where="backward", call=4, signal=signal.SIGSTOP)
    for rank in (1, 2):
        group.start(rank)
    assert group.end() == [DONE | {"workers": 2}] * 2
    (regroup,) = check(group, undisturbed[3])
    assert "silent" in regroup["cause"]


def test_a_worker_leaves_at_a_step_boundary(tmp_path: Path, undisturbed: dict[int, Any]) -> None:
    group = make_group(tmp_path, 2)
    for rank in (0, 1):
        group.start(rank, pause=0.3)
    group.wait_for(lambda: bool(group.generations))
    group.coordinator.leave(0, "its node is preempted")
    assert sorted(group.end(), key=str) == [{"left": "its node is preempted"}, DONE | {"workers": 1}]
    (regroup,) = check(group, undisturbed[2])
    assert regroup["left"] and not regroup["lost"]


def test_rank_0_leaves_although_its_successor_writes_before_its_save_is_stored(
    tmp_path: Path, undisturbed: dict[int, Any]
) -> None:
    group, marker = make_group(tmp_path, 2), tmp_path / "saving"
    group.start(0, pause=0.3, slow_save=3.0, marker=str(marker))
    group.start(1, pause=0.3)
    group.wait_for(marker.exists)
    group.coordinator.leave(0, "its node is preempted")
    assert sorted(group.end(), key=str) == [{"left": "its node is preempted"}, DONE | {"workers": 1}]
    check(group, undisturbed[2])
