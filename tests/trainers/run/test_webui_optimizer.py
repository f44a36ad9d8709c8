"""Tests of the webui's optimizer files: AdamW loads exported moments, and invalid files are errors."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from webui_safety import assert_webui_safe

from dreamfleet.datasets.errors import CheckpointError, FormatError, RecipeError, UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.artifacts.usage import describe
from dreamfleet.trainers.models.formats.embedding import Embedding, read_embedding, write_embedding
from dreamfleet.trainers.models.formats.hypernetwork import read_hypernetwork
from dreamfleet.trainers.models.formats.optimizer_file import (
    AdamState,
    OptimizerFile,
    read_optimizer,
    write_optimizer,
)
from dreamfleet.trainers.models.formats.pickle_writer import load_pickle, save_pickle
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.export import export_run
from dreamfleet.trainers.run.run import run_worker

WORD = {"name": "textual_inversion", "placeholder_token": "qzx", "num_vectors": 2}


def run(folder: Path, method: dict[str, Any], **changes: Any) -> Path:
    tree = tiny.make_recipe(folder, method=method, train__max_train_steps=3, **changes)
    run_worker(build_recipe(tree))
    return Path(tree["output_dir"])


def moments_of(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    found = Checkpoints(Storage(folder)).load_latest()
    assert found is not None
    return found.engine["optimizer"]["state"]


def test_the_webui_loads_the_adam_state_of_an_embedding(tmp_path: Path) -> None:
    folder = run(tmp_path, WORD)
    out = tmp_path / "out"
    written = export_run(str(folder), ["kohya", "optim"], str(out))
    assert [Path(path).name for path in written] == ["kohya", "run.pt", "run.pt.optim"]
    assert read_embedding(out / "kohya" / "run.safetensors").vectors.equal(
        read_embedding(out / "run.pt").vectors
    )
    for name, what in (
        ("kohya", "sd-scripts"),
        ("run.pt.optim", "moments"),
        ("run.pt", "webui"),
    ):
        assert what in str(describe(name, run_name="run", recipe={"method": WORD}))
    assert "predicts" in str(describe("x.yaml", run_name="run", recipe={"method": {"name": "native"}}))
    assert_webui_safe(out / "run.pt.optim")
    saved = load_pickle(out / "run.pt.optim")
    word = read_embedding(out / "run.pt")
    assert saved.keys() == {"hash", "optimizer_state_dict"} and saved["hash"] == word.checksum
    # As in the webui: one parameter in one AdamW, which then loads the state.
    vectors = torch.nn.Parameter(word.vectors.clone())
    optimizer = torch.optim.AdamW([vectors], lr=0.005, weight_decay=0.0)
    optimizer.load_state_dict(saved["optimizer_state_dict"])
    ours = moments_of(folder)[0]
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(optimizer.state[vectors][name], ours[name])
    assert float(ours["step"]) == 3 and ours["exp_avg"].any()
    vectors.grad = torch.ones_like(vectors)
    optimizer.step()
    read = read_optimizer(out / "run.pt.optim", [[2, 16]])
    assert torch.equal(read.states[0].exp_avg, ours["exp_avg"]) and read.states[0].step == 3


def test_the_webui_loads_the_adam_state_of_a_hypernetwork(tmp_path: Path) -> None:
    method = {"name": "hypernetwork", "layer_structure": "1, 2, 1", "add_layer_norm": True}
    folder = run(tmp_path, method)
    out = tmp_path / "out"
    export_run(str(folder), ["optim"], str(out))
    assert_webui_safe(out / "run.pt.optim")
    saved = load_pickle(out / "run.pt.optim")
    assert saved.keys() == {"optimizer_name", "hash", "optimizer_state_dict"}
    assert saved["optimizer_name"] == "AdamW"
    assert saved["hash"] == hashlib.sha256((out / "run.pt").read_bytes()).hexdigest()[:10]
    # The webui's parameter order: widths as in the file, keys before values, each module in its own order.
    data = load_pickle(out / "run.pt")
    weights = [
        torch.nn.Parameter(tensor.clone())
        for width in (key for key in data if type(key) is int)
        for module in data[width]
        for tensor in module.values()
    ]
    optimizer = torch.optim.AdamW(weights, lr=1e-5)
    optimizer.load_state_dict(saved["optimizer_state_dict"])
    moments = moments_of(folder)
    assert len(weights) == len(moments) > 8
    for number, weight in enumerate(weights):
        held = optimizer.state[weight]
        assert held["exp_avg"].shape == weight.shape
        assert torch.equal(held["exp_avg"], moments[number]["exp_avg"])
        weight.grad = torch.ones_like(weight)
    optimizer.step()


def test_a_run_continues_from_an_embedding(tmp_path: Path) -> None:
    first = Embedding("start", torch.full((2, 16), 0.25), step=40)
    start = write_embedding(first, tmp_path / "start.pt")
    still = {**WORD, "initial_embedding": str(start)}
    folder = run(tmp_path, still, optimizer__learning_rate=0.0)
    found = read_embedding(folder / "exports" / "run.pt")
    assert found.step == 43 and torch.equal(found.vectors, first.vectors)
    for changes, message in (
        (
            {"num_vectors": 1},
            r"\[2, 16\].*\[1, 16\].*method.num_vectors: 2",
        ),
        ({"initializer_token": "cat"}, "initial_embedding .*initializer_token"),
        ({"initial_embedding": str(tmp_path / "none.pt")}, "none.pt"),
    ):
        tree = tiny.make_recipe(tmp_path, method=still | changes, output_dir=str(tmp_path / "other"))
        with pytest.raises(UserError, match=message):
            run_worker(build_recipe(tree))


def test_a_run_continues_from_a_hypernetwork(tmp_path: Path) -> None:
    method = {"name": "hypernetwork", "layer_structure": "1, 2, 1"}
    start = run(tmp_path, method, output_dir=str(tmp_path / "first")) / "exports" / "first.pt"
    on = {**method, "initial_hypernetwork": str(start)}
    folder = run(tmp_path, on, optimizer__learning_rate=0.0)
    first, second = read_hypernetwork(start), read_hypernetwork(folder / "exports" / "run.pt")
    assert (first.step, second.step) == (3, 6)
    for width, pair in first.weights.items():
        for before, after in zip(pair, second.weights[width], strict=True):
            assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    tree = tiny.make_recipe(
        tmp_path, method=on | {"add_layer_norm": True}, output_dir=str(tmp_path / "other")
    )
    with pytest.raises(RecipeError, match=r"add_layer_norm: False"):
        run_worker(build_recipe(tree))


def test_methods_without_an_optimizer_file_refuse_to_export_one(tmp_path: Path) -> None:
    folder = run(tmp_path, {"name": "dreambooth"})
    with pytest.raises(RecipeError, match=r"dreambooth .*'optim'"):
        export_run(str(folder), ["safetensors", "optim"], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    from dreamfleet.trainers.run.webui_optimizer import write_optimizer_state

    found = Checkpoints(Storage(folder)).load_latest()
    assert found is not None
    empty = replace(found, engine={"optimizer": {"state": {}, "param_groups": []}})
    recipe = build_recipe(tiny.make_recipe(tmp_path, method=WORD))
    with pytest.raises(CheckpointError, match="first step"):
        write_optimizer_state(recipe, empty, tmp_path / "x.pt")


def state(**changes: Any) -> dict[str, Any]:
    entry = {"step": torch.tensor(3.0), "exp_avg": torch.ones(1, 4), "exp_avg_sq": torch.ones(1, 4)} | changes
    return {"hash": "abcd", "optimizer_state_dict": {"state": {0: entry}, "param_groups": [{"params": [0]}]}}


def test_broken_optimizer_files_are_named(tmp_path: Path) -> None:
    def read(data: Any) -> OptimizerFile:
        return read_optimizer(save_pickle(data, tmp_path / "x.pt.optim"), [[1, 4]])

    assert read(state()).hash == "abcd"
    assert read(state(step=3)).states[0].step == 3.0
    cases: list[tuple[Any, str]] = [
        ([], "not an optimizer file"),
        ({"hash": "a"}, "not an optimizer file"),
        ({**state(), "hash": 3}, "not an optimizer file"),
        ({"hash": "a", "optimizer_state_dict": {"state": {}}}, "0 parameters"),
        ({"hash": "a", "optimizer_state_dict": {"state": {0: 3}}}, "a int where"),
        (state(step="three"), "steps"),
        (state(step=float("nan")), "steps"),
        (state(exp_avg=torch.ones(2, 4)), r"shape \[1, 4\]"),
        (state(exp_avg=torch.ones(1, 4, dtype=torch.int64)), r"shape \[1, 4\]"),
        (state(exp_avg=torch.full((1, 4), float("nan"))), "NaN"),
        (state(exp_avg_sq=-torch.ones(1, 4)), "negative"),
    ]
    for data, message in cases:
        with pytest.raises(FormatError, match=rf"x\.pt\.optim: .*{message}"):
            read(data)
    broken = AdamState(1, torch.full((1, 4), float("inf")), torch.ones(1, 4))
    with pytest.raises(FormatError, match="NaN"):
        write_optimizer(tmp_path / "y.pt", OptimizerFile("abcd", (broken,)))
    assert not (tmp_path / "y.pt.optim").exists()
