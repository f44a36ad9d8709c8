"""Checks the contract of a training method on a small recipe; also for methods from other packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.artifacts.kind import detect_kind
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.recipe import Recipe
from dreamfleet.trainers.run.build import Parts, assemble

State = Mapping[str, torch.Tensor]


def check_method(
    recipe: Recipe,
    folder: Path,
    *,
    exported: Callable[[dict[str, torch.Tensor], Path], State] = lambda state, path: state,
) -> None:
    """Check a method on a recipe with one image per batch: training, checkpoints, exports into ``folder``.

    ``exported(state, path)`` returns the tensors that a file must contain, named as its artifact kind names
    them.
    """
    check_training(build(recipe))
    check_state(build(recipe), build(recipe))
    check_exports(build(recipe), folder, exported=exported)
    check_unknown_format(build(recipe), folder)


def build(recipe: Recipe) -> Parts:
    """Build a run of a recipe in this process."""
    return assemble(recipe, DistributedContext())


def check_training(parts: Parts) -> None:
    """Check that 20 steps on one batch reduce the loss and change all trainable parameters and nothing else."""
    method, engine = parts.method, parts.engine
    model_before, before = read_model(parts), copy_state(parts)
    losses = []
    for step in range(20):
        loss = engine.backward(parts.prepare(engine.to_device(parts.feed.batch(0))))
        assert torch.isfinite(loss.total) and loss.per_sample.shape == (1,)
        engine.step({name: rate(step) for name, rate in parts.rates.items()}, step + 1)
        losses.append(float(loss.total))
    assert losses[-1] < losses[0] * 0.995, losses
    trainable = {id(param) for group in method.groups() for param in group.params.values()}
    expected = {
        f"{part}.{name}"
        for part, module in parts.model.modules().items()
        for name, param in module.named_parameters()
        if id(param) in trainable
    }
    model = read_model(parts)
    changed = {name for name in model if not torch.equal(model_before[name], model[name])}
    assert changed <= expected, f"frozen weights changed: {sorted(changed - expected)}"
    unchanged = [name for name, tensor in method.state().items() if torch.equal(tensor, before[name])]
    assert not unchanged, f"parameters did not change: {unchanged}"


def check_state(parts: Parts, other: Parts) -> None:
    """Check that a state loaded into another instance gives the same loss, and that a wrong state is refused."""
    change_parameters(parts, torch.randn_like)
    other.method.load_state(copy_state(parts))
    losses = [each.method(each.prepare(each.feed.batch(0))).total for each in (parts, other)]
    assert torch.equal(*losses)
    with pytest.raises(RecipeError, match="parameters of the saved state"):
        other.method.load_state({"nonsense": torch.zeros(1)})


def check_exports(
    parts: Parts, folder: Path, *, exported: Callable[[dict[str, torch.Tensor], Path], State]
) -> None:
    """Check that every export format is written, and read back exactly by one of the method's artifact kinds."""
    change_parameters(parts, lambda param: torch.full_like(param, 0.01))
    expected = copy_state(parts)
    paths = parts.method.export(
        Export(folder, "my-cat", formats=parts.method.all_formats, step=5, metadata={"k": "v"})
    )
    assert paths and all(path.exists() for path in paths)
    for path in paths:
        for file in path.iterdir() if path.name == "kohya" else [path]:
            kind = detect_kind(file)
            assert kind.name in parts.recipe.method.artifacts
            found, wanted = kind.read_back(file), exported(expected, file)
            assert wanted.keys() <= found.keys(), file
            for name, tensor in wanted.items():
                assert torch.equal(found[name], tensor), (file, name)


def check_unknown_format(parts: Parts, folder: Path) -> None:
    """Check that an unknown export format is refused with an error that names it."""
    with pytest.raises(RecipeError, match="'gguf'"):
        parts.method.export(Export(folder, "x", formats=["gguf"]))


def change_parameters(parts: Parts, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Add ``change(parameter)`` to every trainable parameter."""
    with torch.no_grad():
        for group in parts.method.groups():
            for param in group.params.values():
                param.add_(change(param))


def copy_state(parts: Parts) -> dict[str, torch.Tensor]:
    """Copy the trainable parameters."""
    return {name: tensor.clone() for name, tensor in parts.method.state().items()}


def read_model(parts: Parts) -> dict[str, torch.Tensor]:
    """Copy every tensor of the model."""
    return {
        f"{part}.{name}": tensor.clone()
        for part, module in parts.model.modules().items()
        for name, tensor in module.state_dict().items()
    }
