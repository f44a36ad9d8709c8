"""Tests of runs that start from an embedding or hypernetwork file, and of Adam's moments beside the file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from small_runs import assert_same, final_state, recipe_tree

from dreamfleet.cluster.jobs.package import pack
from dreamfleet.datasets.errors import RecipeError, UserError
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.launch import fit
from dreamfleet.trainers.models.formats.embedding import Embedding, read_embedding, write_embedding
from dreamfleet.trainers.models.formats.hypernetwork import read_hypernetwork
from dreamfleet.trainers.models.formats.optimizer_file import (
    AdamState,
    OptimizerFile,
    file_hash,
    write_optimizer,
)
from dreamfleet.trainers.models.formats.pickle_writer import load_pickle, save_pickle
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts, assemble
from dreamfleet.trainers.run.export import export_run
from dreamfleet.trainers.run.run import run_worker

EMBEDDING = {"name": "textual_inversion", "placeholder_token": "<x>", "num_vectors": 2}
HYPERNETWORK = {"name": "hypernetwork", "layer_structure": "1, 2, 1", "add_layer_norm": True}


def write_start_embedding(folder: Path) -> Path:
    return write_embedding(Embedding("start", torch.full((2, 16), 0.25), step=40), folder / "start.pt")


def write_start(folder: Path, kind: dict[str, Any]) -> dict[str, Any]:
    """Write a start file of a method, with Adam's moments beside it; return a method section for it."""
    if kind is EMBEDDING:
        path = write_start_embedding(folder)
        write_moments(path, read_embedding(path).checksum, [(2, 16)])
        return {**EMBEDDING, "initial_embedding": str(path)}
    first = tiny.make_recipe(
        folder, method=HYPERNETWORK, output_dir=str(folder / "start"), train__max_train_steps=3, train__seed=1
    )
    run_worker(build_recipe(first))
    export_run(first["output_dir"], ["optim"], str(folder))
    return {**HYPERNETWORK, "initial_hypernetwork": str(folder / "start.pt")}


def write_moments(path: Path, fits: str, shapes: list[tuple[int, ...]], name: str | None = None) -> Path:
    states = [AdamState(7.0, torch.full(shape, 0.01), torch.full(shape, 0.02)) for shape in shapes]
    return write_optimizer(path, OptimizerFile(fits, tuple(states), name))


def moments_of(parts: Parts) -> dict[str, dict[str, Any]]:
    state = parts.engine.state()["optimizer"]["state"]
    return {name: state[number] for number, name in enumerate(parts.engine.params) if number in state}


@pytest.mark.parametrize("kind", [EMBEDDING, HYPERNETWORK], ids=["embedding", "hypernetwork"])
def test_a_resumed_run_does_not_need_the_file(tmp_path: Path, kind: dict[str, Any]) -> None:
    method = write_start(tmp_path, kind)
    straight = recipe_tree(tmp_path, "straight", method=method)
    broken = recipe_tree(tmp_path, "broken", method=method)
    run_worker(build_recipe(straight))
    assert run_worker(build_recipe(broken), should_stop=tiny.Stop(2)).exit_reason == "interrupted"
    for file in tmp_path.glob("start.pt*"):
        file.unlink()
    assert fit(build_recipe(broken), resume=True).summary.exit_reason == "completed"
    assert_same(final_state(straight), final_state(broken))
    export_run(broken["output_dir"], ["pt"], str(tmp_path / "out"))
    read: Any = read_embedding if kind is EMBEDDING else read_hypernetwork
    steps = {read(path).step for path in (tmp_path / "out/broken.pt", *tmp_path.glob("*/exports/*.pt"))}
    assert steps == (
        {46} if kind is EMBEDDING else {3, 9}
    )  # 3: the start file; 9: the run that started from it
    contents = [load_pickle(tmp_path / f"{run}/exports/{run}.pt") for run in ("straight", "broken")]
    for content in contents:
        content.update(name="", dreamfleet="")
    assert_same(*contents)
    with pytest.raises(RecipeError, match=r"start\.pt"):
        fit(build_recipe(straight | {"output_dir": str(tmp_path / "new")}), resume=True)


def test_a_resumed_job_does_not_need_the_file(tmp_path: Path) -> None:
    method = write_start(tmp_path, EMBEDDING)
    recipe = build_recipe(tiny.make_recipe(tmp_path, method=method, output_dir="s3://bucket/run"))
    assert {"inputs/start.pt", "inputs/start.pt.optim"} < set(pack(recipe).files)
    (tmp_path / "start.pt").unlink()
    with pytest.raises(RecipeError, match=r"method\.initial_embedding: "):
        pack(recipe)
    parcel = pack(recipe, resume=True)
    assert not [name for name in parcel.files if "start" in name]
    assert parcel.recipe.method == recipe.method


def test_the_yaml_beside_a_model_is_packaged(tmp_path: Path) -> None:
    for name in ("cat.safetensors", "cat.yaml", "dog.yaml"):
        (tmp_path / name).write_text("{}")
    tree = tiny.make_recipe(tmp_path, output_dir="s3://bucket/run")
    tree["model"]["pretrained_model_name_or_path"] = str(tmp_path / "cat.safetensors")
    packed = {name for name in pack(build_recipe(tree)).files if not name.startswith("inputs/pictures")}
    assert packed == {"inputs/cat.safetensors", "inputs/cat.yaml"}


@pytest.mark.parametrize("average", [False, True])
def test_the_moments_of_an_embedding_are_loaded(
    tmp_path: Path, average: bool, caplog: pytest.LogCaptureFixture
) -> None:
    method = write_start(tmp_path, EMBEDDING)
    tree = tiny.make_recipe(tmp_path, method=method, engine={"use_ema": average})
    with caplog.at_level(logging.INFO, logger="dreamfleet"):
        parts = assemble(build_recipe(tree), DistributedContext())
    assert "moments of 7 steps" in caplog.text
    (held,) = moments_of(parts).values()
    assert float(held["step"]) == 7.0
    assert torch.equal(held["exp_avg"], torch.full((2, 16), 0.01))
    assert torch.equal(held["exp_avg_sq"], torch.full((2, 16), 0.02))
    assert torch.equal(parts.method.state()["vectors"], torch.full((2, 16), 0.25))
    if average:
        assert torch.equal(parts.engine.state()["ema"]["vectors"], torch.full((2, 16), 0.25))
    summary = run_worker(build_recipe(tree))
    assert summary.steps == 4
    export_run(tree["output_dir"], ["optim"], str(tmp_path / "out"))
    saved = load_pickle(tmp_path / "out/run.pt.optim")["optimizer_state_dict"]["state"][0]
    assert float(saved["step"]) == 11.0


def test_an_optimizer_file_saved_by_torch_is_loaded(tmp_path: Path) -> None:
    start = write_start_embedding(tmp_path)
    vectors = torch.nn.Parameter(torch.full((2, 16), 0.25))
    optimizer = torch.optim.AdamW([vectors], lr=0.005, weight_decay=0.0)
    for _ in range(3):
        vectors.grad = torch.ones_like(vectors)
        optimizer.step()
    state = optimizer.state_dict()
    torch.save({"hash": read_embedding(start).checksum, "optimizer_state_dict": state}, f"{start}.optim")
    (held,) = moments_of(_assembled(tmp_path, {**EMBEDDING, "initial_embedding": str(start)})).values()
    assert_same(dict(held), state["state"][0])


def test_the_moments_of_a_hypernetwork_are_loaded_in_file_order(tmp_path: Path) -> None:
    """Test with widths in descending order: the webui writes them in the order of the user's selection."""
    method = write_start(tmp_path, HYPERNETWORK)
    start = tmp_path / "start.pt"
    data, saved = load_pickle(start), load_pickle(tmp_path / "start.pt.optim")
    widths = [key for key in data if type(key) is int]
    assert len(widths) > 1
    turned = {width: data[width] for width in reversed(widths)} | data
    per_width = len(saved["optimizer_state_dict"]["state"]) // len(widths)
    numbers = [n for w in reversed(range(len(widths))) for n in range(w * per_width, (w + 1) * per_width)]
    before = {name: tensor["exp_avg"] for name, tensor in moments_of(_assembled(tmp_path, method)).items()}
    assert any(moment.any() for moment in before.values())
    save_pickle(turned, start)
    states = saved["optimizer_state_dict"]["state"]
    saved["optimizer_state_dict"]["state"] = {k: states[number] for k, number in enumerate(numbers)}
    saved["hash"] = file_hash(start)
    save_pickle(saved, tmp_path / "start.pt.optim")
    after = {name: tensor["exp_avg"] for name, tensor in moments_of(_assembled(tmp_path, method)).items()}
    assert_same(before, after)


def _assembled(folder: Path, method: dict[str, Any], **changes: Any) -> Parts:
    return assemble(build_recipe(tiny.make_recipe(folder, method=method, **changes)), DistributedContext())


def test_incompatible_moments_are_named_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start = write_start_embedding(tmp_path)
    method, fits = {**EMBEDDING, "initial_embedding": str(start)}, read_embedding(start).checksum

    def ignored(**changes: Any) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="dreamfleet"):
            parts = _assembled(tmp_path, method, **changes)
        assert not moments_of(parts)
        assert torch.equal(parts.method.state()["vectors"], torch.full((2, 16), 0.25))
        return caplog.text

    assert "with moments of" not in ignored() and "ignored" not in caplog.text
    write_moments(start, "beef", [(2, 16)])
    assert "another file" in ignored()
    write_moments(start, fits, [(1, 16)])
    assert "shape [2, 16]" in ignored()
    write_moments(start, fits, [(2, 16)], name="RMSprop")
    assert "RMSprop" in ignored()
    for broken in (b"", b"PK\x03\x04nonsense", b"\x80\x04cos\nsystem\n(S'true'\ntR."):
        (tmp_path / "start.pt.optim").write_bytes(broken)
        assert "ignored" in ignored()
    write_moments(start, fits, [(2, 16)])
    assert "adafactor" in ignored(optimizer={"name": "adafactor", "learning_rate": 1e-3})


def test_check_reports_an_incompatible_optimizer_file(tmp_path: Path) -> None:
    from dreamfleet.trainers.run.dry_run import check_run

    method = {**EMBEDDING, "num_vectors": 1, "initial_embedding": str(write_start_embedding(tmp_path))}
    lines = check_run(build_recipe(tiny.make_recipe(tmp_path, method=method)))
    assert [line.name for line in lines if not line.ok] == ["model"]
    assert "method.num_vectors: 2" in lines[-1].detail
    with pytest.raises(UserError, match=r"num_vectors: 2"):
        _assembled(tmp_path, method)
