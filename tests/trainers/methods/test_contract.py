"""The contract every method keeps, over the registry, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from method_cases import EXPORTED, IMAGES, RATES, SECTIONS, fixed_batches, snapshot

from dreamfleet.datasets.errors import RecipeError
from dreamfleet.trainers.artifacts.kind import detect_kind
from dreamfleet.trainers.config.method import METHODS
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts, assemble


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and images, shared by the tests."""
    folder = tmp_path_factory.mktemp("methods")
    tiny.make_tiny_model(folder / "model")
    tiny.make_images(folder / "pictures", 6)
    tiny.make_images(folder / "one", 1)
    tiny.make_two_classes(folder / "labelled", 10)
    return folder


@pytest.fixture(params=sorted(METHODS.names()))
def method_name(request: pytest.FixtureRequest) -> str:
    """Each registered method; one without an entry in SECTIONS fails here, so that a new one cannot be forgotten."""
    assert request.param in SECTIONS, f"add a tiny section for {request.param} to SECTIONS"
    return request.param


def make_parts(workplace: Path, name: str, **changes: Any) -> Parts:
    options = {
        "method": SECTIONS[name],
        "optimizer__learning_rate": RATES[name],
        "data__instance_data_dir": str(workplace / IMAGES.get(name, "one")),
        "train__train_batch_size": 1,
        **changes,
    }
    return assemble(build_recipe(tiny.make_recipe(workplace, **options)), DistributedContext())


def test_twenty_steps_on_one_image_lower_the_loss_and_touch_only_what_learns(
    workplace: Path, method_name: str
) -> None:
    parts = make_parts(workplace, method_name)
    before, learned = snapshot(parts), {name: t.clone() for name, t in parts.method.state().items()}
    losses = []
    for batch, step in zip(fixed_batches(parts), range(20), strict=False):
        loss = parts.engine.backward(parts.prepare(parts.engine.to_device(batch)))
        assert torch.isfinite(loss.total) and loss.per_sample.shape == (1,)
        parts.engine.step({name: rate(step) for name, rate in parts.rates.items()}, step + 1)
        losses.append(float(loss.total))
    assert losses[-1] < losses[0] * 0.995, losses
    mine = {id(p) for group in parts.method.groups() for p in group.params.values()}
    learning = {
        f"{part}.{name}"
        for part, module in parts.model.modules().items()
        for name, param in module.named_parameters()
        if id(param) in mine
    }
    after = snapshot(parts)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= learning, changed - learning
    unmoved = [name for name, t in parts.method.state().items() if torch.equal(t, learned[name])]
    assert not unmoved, unmoved


def test_every_vector_of_an_embedding_trains(workplace: Path) -> None:
    # diffusers #4450 trained the first of several vectors only
    parts = make_parts(workplace, "textual_inversion")
    before = parts.method.vectors.detach().clone()
    parts.engine.backward(parts.prepare(parts.engine.to_device(parts.feed.batch(0))))
    parts.engine.step({"embedding": 0.1}, 1)
    assert ((parts.method.vectors - before).abs().sum(1) > 0).all()


def test_state_is_what_learns_and_reads_back(workplace: Path, method_name: str) -> None:
    parts, other = make_parts(workplace, method_name), make_parts(workplace, method_name)
    with torch.no_grad():
        for group in parts.method.groups():
            for param in group.params.values():
                param.add_(torch.randn_like(param))
    other.method.load_state({name: t.clone() for name, t in parts.method.state().items()})
    batch = parts.prepare(parts.feed.batch(0))
    assert torch.equal(parts.method(batch).total, other.method(other.prepare(other.feed.batch(0))).total)
    with pytest.raises(RecipeError, match="other parameters"):
        other.method.load_state({"nonsense": torch.zeros(1)})


def test_exports_read_back_equal(workplace: Path, method_name: str, tmp_path: Path) -> None:
    parts = make_parts(workplace, method_name)
    with torch.no_grad():
        for group in parts.method.groups():
            for param in group.params.values():
                param.add_(0.01)
    expected = {name: t.clone() for name, t in parts.method.state().items()}
    paths = parts.method.export(
        Export(
            tmp_path,
            "my-cat",
            formats=parts.method.all_formats,
            step=5,
            metadata={"k": "v"},
            precision="fp32",
        )
    )
    assert paths and all(path.exists() for path in paths)
    paths = [file for path in paths for file in (path.iterdir() if path.name == "kohya" else [path])]
    for path in paths:
        kind = detect_kind(path)
        assert kind.name in METHODS.get(method_name).artifacts
        found, wanted = (
            kind.read_back(path),
            EXPORTED.get(method_name, lambda state, path: state)(expected, path),
        )
        assert wanted.keys() <= found.keys(), path
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), (path, name)


def test_an_unknown_export_format_is_told(workplace: Path, method_name: str, tmp_path: Path) -> None:
    parts = make_parts(workplace, method_name)
    with pytest.raises(RecipeError, match="'gguf'"):
        parts.method.export(Export(tmp_path, "x", formats=["gguf"], step=0, metadata={}, precision="fp32"))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_prior_loss_is_the_papers_for_every_batch_size(
    workplace: Path, batch: int, snr_gamma: float | None
) -> None:
    # diffusers broadcasts wrongly with snr_gamma and the prior together; ray's template paired batches wrongly.
    parts = make_parts(
        workplace,
        "dreambooth",
        method={
            "name": "dreambooth",
            "with_prior_preservation": True,
            "prior_loss_weight": 0.7,
            "num_class_images": 4,
        },
        data__instance_data_dir=str(workplace / "pictures"),
        data__class_data_dir=str(tiny.make_images(workplace / "class", 4, seed=9)),
        train__train_batch_size=batch,
        train__snr_gamma=snr_gamma,
    )
    raw = parts.feed.batch(0)
    assert len(raw["prompts"]) == 2 * batch
    assert raw["prompts"] == ["a photo of sks cat"] * batch + ["a photo of a cat"] * batch
    loss = parts.method(parts.prepare(raw))
    rows = []
    for row in range(2 * batch):
        alone = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in raw.items()}
        alone |= {"prompts": [raw["prompts"][row]], "num_instances": 1, "weights": torch.ones(1)}
        rows.append(parts.method(parts.prepare(alone)).total)
    rows = torch.stack(rows)
    assert torch.allclose(loss.total, rows[:batch].mean() + 0.7 * rows[batch:].mean(), rtol=1e-4)


def test_several_concepts_all_train_with_their_own_prompts(workplace: Path) -> None:
    # the webui's DreamBooth extension trained only the first of several concepts (issue 743 there)
    concepts = [
        {
            "instance_data_dir": str(tiny.make_images(workplace / f"c{k}", 2, seed=k)),
            "instance_prompt": f"sks{k} cat",
        }
        for k in range(2)
    ]
    tree = tiny.make_recipe(workplace, train__train_batch_size=4)
    tree["data"] = {"concepts_list": concepts, "resolution": tiny.RESOLUTION}
    parts = assemble(build_recipe(tree), DistributedContext())
    assert sorted(parts.feed.batch(0)["prompts"]) == ["sks0 cat", "sks0 cat", "sks1 cat", "sks1 cat"]
