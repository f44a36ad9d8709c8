"""Test the method contract for every registered method on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from method_cases import EXPORTED, IMAGES, RATES, SECTIONS
from method_contract import check_exports, check_state, check_training, check_unknown_format

from dreamfleet.trainers.config.method import METHODS
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts, assemble


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and images, shared by the tests."""
    folder = tmp_path_factory.mktemp("methods")
    tiny.make_tiny_model(folder / "model")
    tiny.make_images(folder / "pictures", 6)
    tiny.make_images(folder / "one", 1)
    tiny.make_two_classes(folder / "labelled", 10)
    return folder


@pytest.fixture(params=sorted(METHODS.names()))
def method_name(request: pytest.FixtureRequest) -> str:
    """Return the name of each registered method; fail for a method without an entry in SECTIONS."""
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


def test_training_lowers_the_loss_and_changes_trainable_parameters_only(
    workplace: Path, method_name: str
) -> None:
    check_training(make_parts(workplace, method_name))


def test_every_vector_of_an_embedding_trains(workplace: Path) -> None:
    # diffusers #4450: only the first of several vectors was trained.
    parts = make_parts(workplace, "textual_inversion")
    before = parts.method.vectors.detach().clone()
    parts.engine.backward(parts.prepare(parts.engine.to_device(parts.feed.batch(0))))
    parts.engine.step({"embedding": 0.1}, 1)
    assert ((parts.method.vectors - before).abs().sum(1) > 0).all()


def test_a_state_round_trips(workplace: Path, method_name: str) -> None:
    check_state(make_parts(workplace, method_name), make_parts(workplace, method_name))


def test_exports_round_trip_exactly(workplace: Path, method_name: str, tmp_path: Path) -> None:
    exported = EXPORTED.get(method_name, lambda state, path: state)
    check_exports(make_parts(workplace, method_name), tmp_path, exported=exported)


def test_an_unknown_export_format_is_an_error(workplace: Path, method_name: str, tmp_path: Path) -> None:
    check_unknown_format(make_parts(workplace, method_name), tmp_path)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_the_prior_loss_equals_that_of_the_paper_for_any_batch_size(
    workplace: Path, batch: int, snr_gamma: float | None
) -> None:
    # diffusers broadcasts wrongly if snr_gamma and the prior loss are combined; Ray's template paired batches
    # wrongly.
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
    # The webui's DreamBooth extension trained only the first of several concepts (its issue 743).
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
