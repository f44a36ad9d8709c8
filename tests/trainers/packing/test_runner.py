"""Test that packed trainings equal trainings alone: for every method and family, and after resumes and failures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from method_cases import SECTIONS
from packed_runs import (
    VARIANTS,
    assert_equal_runs,
    last_checkpoint,
    make_trees,
    metrics,
    out_of_memory_above,
    packed_method,
    run_alone,
    run_packed,
    tasks_of,
)
from task_sources import ListSource
from tiny_models import FAMILIES, tiny_family

from dreamfleet.trainers.config.method import METHODS
from dreamfleet.trainers.config.packing import find_unpackable
from dreamfleet.trainers.engines.model_passes import Micro
from dreamfleet.trainers.packing.model import PackedModel
from dreamfleet.trainers.packing.pack import Pack
from dreamfleet.trainers.packing.runner import run_tasks
from dreamfleet.trainers.recipe import build_recipe

OTHER_OPTIMIZERS = ("prodigy", "adamw_schedulefree", "lion")


def test_packed_trainings_may_have_different_optimizers(tmp_path: Path) -> None:
    """Test that each has its own estimates and averages, and exports what it exports alone."""
    trees = {}
    for number, name in enumerate(OTHER_OPTIMIZERS):
        rate = 1.0 if name.startswith("prodigy") else 1e-4
        changes = {"optimizer": {"name": name, "learning_rate": rate}, "train__seed": number}
        method = {**SECTIONS["textual_inversion"], "num_vectors": 1 + number % 2}
        trees[name] = tiny.make_recipe(tmp_path, method=method, **changes)
    run_packed(trees, tmp_path / "packed")
    run_alone(trees, tmp_path / "alone")
    for name in trees:
        ours, theirs = (last_checkpoint(tmp_path / kind / name) for kind in ("packed", "alone"))
        for key, value in ours.learned.items():
            torch.testing.assert_close(value, theirs.learned[key], rtol=1e-3, atol=1e-4)
        lines = [metrics(tmp_path / kind / name)[-1] for kind in ("packed", "alone")]
        assert ("effective_lr" in lines[0]) is ("prodigy" in name or "schedulefree" in name)
        for key in ("loss", "grad_norm"):
            assert lines[0][key] == pytest.approx(lines[1][key], rel=1e-3)
        if "effective_lr" in lines[0]:
            assert lines[0]["effective_lr"] == pytest.approx(lines[1]["effective_lr"], rel=1e-2)


@pytest.fixture(scope="module", params=FAMILIES)
def workplace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder, named after a model family, with a tiny model of that family."""
    folder = tmp_path_factory.mktemp("packing") / request.param
    tiny_family(request.param).save_folder(folder / "model")
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Micro]:
    """Return a list to which the micro-batches of packed passes are added."""
    found: list[Micro] = []
    backward = Pack.backward

    def record(pack: Pack, micros: Sequence[Micro]) -> Any:
        found.extend(micros)
        return backward(pack, micros)

    monkeypatch.setattr(Pack, "backward", record)
    return found


def test_every_method_can_be_packed_or_says_why_not(tmp_path: Path) -> None:
    for name in METHODS.names():
        section = packed_method(name)[0]
        if name == "aesthetic_gradients" or name == "discriminator":
            continue  # they train no diffusion model
        assert find_unpackable(build_recipe(tiny.make_recipe(tmp_path, method=section))) is None, name


def test_trainings_of_every_method_in_one_pack_equal_trainings_alone(workplace: Path, tmp_path: Path) -> None:
    variants = [packed_method(name) for name in sorted(VARIANTS)]
    if workplace.name.startswith("sd2"):  # sd1's architecture: other text encoder, other prediction
        variants = [sections[:1] for sections in variants]
    methods = [section for sections in variants for section in sections]
    trees = make_trees(workplace, methods)
    source = run_packed(trees, tmp_path / "packed")
    assert {name: end.error for name, end in source.ends.items()} == dict.fromkeys(trees)
    assert all(end.summary and "packed" in end.summary["engine"] for end in source.ends.values())
    run_alone(trees, tmp_path / "alone")
    for name in trees:
        assert_equal_runs(tmp_path / "packed" / name, tmp_path / "alone" / name)


def test_the_draws_of_a_packed_training_equal_those_alone_bit_for_bit(
    tmp_path: Path, drawn: list[Micro]
) -> None:
    trees = make_trees(
        tmp_path, packed_method("textual_inversion") * 2, **tiny.SHAPES, data__shuffle_tags=True
    )
    images = tiny.make_shapes(tmp_path / "shapes")
    for tree in trees.values():
        tree["data"]["instance_data_dir"] = str(images)
    run_packed(trees, tmp_path / "packed")
    assert len({tuple(micro.batch["noise"].shape[2:]) for micro in drawn}) == 3  # three buckets
    together: dict[str, list[Any]] = {}
    for micro in drawn:
        together.setdefault(str(micro.engine.seed), []).append(micro.batch)
    for tree in trees.values():
        drawn.clear()
        alone = {"x": tree}
        run_packed(alone, tmp_path / f"one-{tree['train']['seed']}")
        theirs = together[str(tree["train"]["seed"])]
        assert len(theirs) == len(drawn)
        for one, other in zip(theirs, (micro.batch for micro in drawn), strict=True):
            assert one.keys() == other.keys()
            for key, value in other.items():
                same = torch.equal(one[key], value) if isinstance(value, torch.Tensor) else one[key] == value
                assert same, key


def test_a_slot_is_resumed_alone_and_a_run_is_resumed_in_a_slot(tmp_path: Path) -> None:
    trees = make_trees(tmp_path, packed_method("dreambooth"), train__max_train_steps=6)
    run_alone(trees, tmp_path / "straight")
    first = ListSource(tasks_of(trees, tmp_path / "a"))
    polls = tiny.Stop(3 * len(trees) + 8)
    run_tasks(first, capacity=8, should_stop=polls)
    assert {end.exit_reason for end in first.ends.values()} == {"interrupted"}
    run_alone(trees, tmp_path / "a", resume=True)
    run_alone(trees, tmp_path / "b", should_stop=tiny.Stop(3))
    run_packed(trees, tmp_path / "b")
    for name in trees:
        assert_equal_runs(tmp_path / "a" / name, tmp_path / "straight" / name)
        assert_equal_runs(tmp_path / "b" / name, tmp_path / "straight" / name)


def test_a_training_that_diverges_fails_alone(tmp_path: Path) -> None:
    trees = make_trees(tmp_path, packed_method("dreambooth") + packed_method("hypernetwork"))
    broken = next(iter(trees))
    trees[broken]["optimizer"]["learning_rate"] = 1e30
    source = run_packed(trees, tmp_path / "packed")
    assert source.ends[broken].exit_reason == "failed"
    assert "no longer" in str(source.ends[broken].error)
    others = {name: tree for name, tree in trees.items() if name != broken}
    run_alone(others, tmp_path / "alone")
    for name in others:
        assert source.ends[name].exit_reason == "completed"
        assert_equal_runs(tmp_path / "packed" / name, tmp_path / "alone" / name)


def test_a_task_that_cannot_start_fails_alone_and_its_slot_is_refilled(tmp_path: Path) -> None:
    trees = make_trees(tmp_path, packed_method("textual_inversion") * 2)
    first, *rest = trees
    (tmp_path / "empty").mkdir()
    trees[first]["data"]["instance_data_dir"] = str(tmp_path / "empty")
    source = run_packed(trees, tmp_path / "packed", capacity=2)
    assert source.ends[first].exit_reason == "failed" and source.ends[first].kind == "DataError"
    assert "empty" in str(source.ends[first].error)
    assert [source.ends[name].exit_reason for name in rest] == ["completed"] * len(rest)
    assert [task.name for task in source.starts] == list(trees)
    assert "empty" in (tmp_path / "packed" / first / "run.log").read_text()
    for name in rest:  # its message is in no other run's log
        log = tmp_path / "packed" / name / "run.log"
        assert not log.exists() or "empty" not in log.read_text()


def test_a_free_slot_is_refilled_while_others_run(tmp_path: Path, drawn: list[Micro]) -> None:
    trees = make_trees(tmp_path, packed_method("textual_inversion") * 2)
    for tree, steps in zip(trees.values(), (9, 2, 2, 2), strict=True):
        tree["train"] |= {"max_train_steps": steps, "gradient_accumulation_steps": 1}
    source = run_packed(trees, tmp_path, capacity=2)
    assert all(end.exit_reason == "completed" for end in source.ends.values())
    # The first training has ten passes (one rehearsal), and each of them is shared with another training but the last.
    engines = [id(micro.engine) for micro in drawn]
    longest = max(set(engines), key=engines.count)
    alone = sum(
        engines[k] == longest
        and (k + 1 == len(engines) or engines[k + 1] == longest)
        and engines[k - 1] == longest
        for k in range(1, len(engines))
    )
    assert alone <= 1


def test_a_training_is_stopped_after_a_round_and_its_slot_is_free(tmp_path: Path) -> None:
    holdout = tiny.make_images(tmp_path / "holdout", 1, seed=5)
    trees = make_trees(
        tmp_path,
        packed_method("textual_inversion"),
        train__max_train_steps=8,
        validation={"steps": 2, "holdout": str(holdout), "holdout_timesteps": 1},
    )
    first, second = trees
    source = ListSource(
        tasks_of(trees, tmp_path / "packed", figures=("holdout_loss",)),
        decide=lambda task, figures: task.name == first and figures["step"] >= 2,
    )
    run_tasks(source, capacity=2)

    def steps_of(name: str) -> list[int]:
        return [figures["step"] for figures in source.rounds[name]]

    assert source.ends[first].exit_reason == "stopped" and steps_of(first) == [0, 2]
    assert source.ends[second].exit_reason == "completed" and steps_of(second) == [0, 2, 4, 6, 8]
    summary = json.loads((tmp_path / "packed" / first / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["exit_reason"] == "stopped by the scheduler"


def test_out_of_memory_halves_the_pack_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = make_trees(tmp_path, packed_method("dreambooth") * 2)
    run_alone(trees, tmp_path / "alone")
    monkeypatch.setattr(PackedModel, "predict", out_of_memory_above(2))
    source = run_packed(trees, tmp_path / "packed")
    assert {end.exit_reason for end in source.ends.values()} == {"completed"}
    for name in trees:
        assert_equal_runs(tmp_path / "packed" / name, tmp_path / "alone" / name)


def test_a_training_that_exceeds_the_memory_alone_fails_with_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = make_trees(tmp_path, packed_method("textual_inversion"))
    monkeypatch.setattr(PackedModel, "predict", out_of_memory_above(0))
    source = run_packed(trees, tmp_path / "packed")
    assert {(end.exit_reason, end.kind) for end in source.ends.values()} == {("failed", "ResourceError")}
    assert all("train.gradient_checkpointing" in str(end.error) for end in source.ends.values())


def test_whole_models_are_trained_one_after_the_other_from_the_restored_base(tmp_path: Path) -> None:
    section = {"name": "dreambooth", "train_text_encoder": True}
    trees = make_trees(tmp_path, [section, packed_method("textual_inversion")[0], section, section])
    source = run_packed(trees, tmp_path / "packed")
    assert [task.name for task in source.starts] == list(trees)
    run_alone(trees, tmp_path / "alone")
    for name in trees:
        if name.startswith("dreambooth"):
            ours, theirs = (last_checkpoint(tmp_path / kind / name) for kind in ("packed", "alone"))
            assert all(torch.equal(ours.learned[key], theirs.learned[key]) for key in theirs.learned)
        assert_equal_runs(tmp_path / "packed" / name, tmp_path / "alone" / name)
