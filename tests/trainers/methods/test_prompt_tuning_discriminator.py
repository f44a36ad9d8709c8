"""Test the discriminator loss of prompt tuning: values, gradients, memory, and recipe errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from dreamfleet.cluster.jobs.package import pack
from dreamfleet.datasets.errors import FormatError, ModelError, RecipeError
from dreamfleet.trainers.driver.preflight import check_inputs
from dreamfleet.trainers.engines.torch_engine import TorchEngine
from dreamfleet.trainers.memory.profile import count_run, method_shape
from dreamfleet.trainers.models.formats.convnext import write_convnext
from dreamfleet.trainers.models.vision.discriminator import load_discriminator, make_network, save_network
from dreamfleet.trainers.recipe import build_recipe, load_recipe
from dreamfleet.trainers.run.build import DistributedContext, Parts, assemble

SECTION = {"name": "prompt_tuning", "placeholder_token": "<x>", "initializer_token": "cat"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model, six images, and a tiny three-class discriminator in two formats."""
    folder = tmp_path_factory.mktemp("judged")
    tiny.make_recipe(folder)
    torch.manual_seed(3)
    network = make_network(depths=[1, 1], hidden_sizes=[8, 16], classes=["a", "b", "c"], drop_path=0.0)
    torch.nn.init.normal_(network.classifier.weight)
    save_network(network, folder / "judge", size=24, dtype=torch.float32, metadata={})
    write_convnext(network.state_dict(), folder / "judge.pth")
    return folder


def make_tree(folder: Path, section: dict[str, Any], **changes: Any) -> dict[str, Any]:
    judge = {"discriminator": str(folder / "judge"), "discriminator_class": 2}
    return tiny.make_recipe(folder, method={**SECTION, **judge, **section}, **changes)


def make_parts(folder: Path, section: dict[str, Any], **changes: Any) -> Parts:
    return assemble(build_recipe(make_tree(folder, section, **changes)), DistributedContext())


@pytest.mark.parametrize("replaces", [False, True])
def test_the_discriminator_loss_is_added_to_or_replaces_the_noise_loss(
    workplace: Path, replaces: bool
) -> None:
    section = {"discriminator_loss_w": 0.25, "discriminator_replaces": replaces}
    parts = make_parts(workplace, section, train__train_batch_size=3)
    plain = make_parts(workplace, {"discriminator": None}, train__train_batch_size=3)
    batch = parts.prepare(parts.feed.batch(0))
    loss, noise = parts.method(batch), plain.method(plain.prepare(plain.feed.batch(0))).total
    judged = loss.extras["discriminator_loss"]
    assert torch.allclose(loss.extras["noise_loss"], noise) and 0 < judged < 1
    assert torch.allclose(loss.total, 0.25 * judged + (0 if replaces else noise), rtol=1e-5)
    assert loss.per_sample.shape == (3,) and torch.allclose(loss.per_sample.mean(), loss.total, rtol=1e-5)


def test_the_discriminator_gets_the_decoded_estimate(workplace: Path) -> None:
    parts = make_parts(workplace, {"discriminator_replaces": True})
    batch = parts.prepare(parts.feed.batch(0))
    seen: list[torch.Tensor] = []
    decode = parts.model.decode
    parts.model.decode = lambda latents: seen.append(decode(latents)) or seen[-1]  # type: ignore[method-assign]
    loss = parts.method(batch)
    judge = load_discriminator(str(workplace / "judge"))
    resized = torch.nn.functional.interpolate(seen[0], (24, 24), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in (judge.preprocessing.mean, judge.preprocessing.std))
    expected = judge.network(((resized + 1) / 2 - mean) / std).logits.softmax(-1)[:, 2]
    assert len(seen) == 1 and torch.allclose(loss.total, 1 - expected.mean(), atol=1e-6)


def test_reconstruction_and_discriminator_share_one_decoding(workplace: Path) -> None:
    parts = make_parts(workplace, {"rec_loss_w": 0.5})
    batch, count = parts.prepare(parts.feed.batch(0)), []
    decode = parts.model.decode
    parts.model.decode = lambda latents: count.append(1) or decode(latents)  # type: ignore[method-assign]
    extras = parts.method(batch).extras
    assert {"noise_loss", "reconstruction_loss", "discriminator_loss"} == extras.keys()
    assert len(count) == 2, "the estimate once, and the picture"


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradients_reach_both_embeddings_only(workplace: Path, precision: str) -> None:
    parts = make_parts(workplace, {"discriminator_replaces": True}, train__mixed_precision=precision)
    assert isinstance(parts.engine, TorchEngine)
    (network,) = parts.method.helpers.values()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    first = parts.engine.backward(parts.prepare(parts.feed.batch(0)))
    for param in parts.engine.params.values():
        assert (param.grad.abs().sum(1) > 0).all()
    assert not any(param.requires_grad or param.grad is not None for param in network.parameters())
    assert not network.training and sorted(dict(parts.method.named_parameters())) == ["negative", "positive"]
    for step in range(15):
        parts.engine.step({"positive": 0.05, "negative": 0.05}, step + 1)
        last = parts.engine.backward(parts.prepare(parts.feed.batch(0)))
    assert last.total < first.total
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_accumulation_gives_the_gradient_of_the_whole_batch(workplace: Path) -> None:
    found = []
    for batch, micros in ((6, 1), (2, 3)):
        changes = {"train__train_batch_size": batch, "train__gradient_accumulation_steps": micros}
        parts = make_parts(workplace, {}, **changes)
        for micro in range(micros):
            parts.engine.backward(parts.prepare(parts.feed.batch(0, micro)), last=micro == micros - 1)
        found.append([param.grad.clone() for param in parts.engine.params.values()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(*found, strict=True))


def test_a_memory_plan_includes_the_discriminator(workplace: Path) -> None:
    counts = []
    for judge in (None, str(workplace / "judge")):
        recipe = build_recipe(make_tree(workplace, {"discriminator": judge}))
        counts.append(count_run(recipe, method_shape(recipe), 1))
    network = load_discriminator(str(workplace / "judge")).network
    assert counts[1].frozen - counts[0].frozen == 4 * sum(p.numel() for p in network.parameters())
    assert counts[1].full.activations > counts[0].full.activations


def test_paths_are_relative_to_the_recipe_and_packaged_with_a_job(workplace: Path) -> None:
    tree = make_tree(workplace, {"discriminator": "judge"}, output_dir="s3://bucket/run")
    recipe = load_recipe(tiny.write_recipe(workplace / "r.yaml", tree))
    assert recipe.method.discriminator == str(workplace / "judge")
    parcel = pack(recipe)
    assert parcel.recipe.method.discriminator == "./inputs/judge"
    assert {"inputs/judge/config.json", "inputs/judge/model.safetensors"} <= parcel.files.keys()
    hub = load_recipe(
        tiny.write_recipe(workplace / "r.yaml", make_tree(workplace, {"discriminator": "a/b-1"}))
    )
    assert hub.method.discriminator == "a/b-1"


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        (
            {"discriminator_class": 3},
            ModelError,
            "discriminator_class: 3.*judge .*0 to 2",
        ),
        ({"discriminator": "/nowhere/judge"}, ModelError, "/nowhere/judge: "),
        ({"discriminator": "MODEL"}, ModelError, "not a discriminator"),
        ({"discriminator": "TORN"}, FormatError, "torn.pth"),
        ({"discriminator": None, "discriminator_replaces": True}, RecipeError, "needs"),
        ({"rec_loss_w": 1, "discriminator_replaces": True}, RecipeError, "one of them"),
    ],
)
def test_unsuitable_classifiers_are_errors(
    workplace: Path, section: dict[str, Any], error: type[Exception], message: str
) -> None:
    (workplace / "torn.pth").write_bytes((workplace / "judge.pth").read_bytes()[:900])
    places = {"MODEL": str(workplace / "model"), "TORN": str(workplace / "torn.pth")}
    section = {key: places.get(value, value) for key, value in section.items()}
    with pytest.raises(error, match=message):
        make_parts(workplace, section)


def test_a_missing_classifier_is_reported_before_workers_start(workplace: Path) -> None:
    recipe = build_recipe(make_tree(workplace, {"discriminator": str(workplace / "gone.pth")}))
    with pytest.raises(RecipeError, match=r"method\.discriminator: .*gone\.pth"):
        check_inputs(recipe)
    check_inputs(build_recipe(make_tree(workplace, {"discriminator": str(workplace / "judge.pth")})))
