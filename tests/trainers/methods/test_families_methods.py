"""Test every gradient method on SD 2.x and SDXL: training, resume, and exports that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine_parts
import memory_plans as plans
import numpy as np
import pytest
import tiny
import torch
from drawing import generate
from method_cases import RATES, SECTIONS
from stock_models import load, stock_pipeline
from tiny_models import FAMILIES, tiny_family

from dreamfleet.datasets.errors import ModelError
from dreamfleet.trainers.config.method import METHODS
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.models.embeddings import install_embedding, install_negative
from dreamfleet.trainers.models.formats.embedding import read_embedding
from dreamfleet.trainers.models.formats.hypernetwork import read_hypernetwork
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import DistributedContext, Parts, assemble
from dreamfleet.trainers.run.dry_run import check_run

OTHERS = [family for family in FAMILIES if family != "sd1"]  # test_contract.py covers sd1
# The methods that train Stable Diffusion.
GRADIENT = sorted(set(METHODS.names()) - {"aesthetic_gradients", "discriminator"})


@pytest.fixture(scope="module", params=OTHERS)
def workplace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder, named after a model family, with a tiny model of that family and images."""
    folder = tmp_path_factory.mktemp("families") / request.param
    tiny_family(request.param).save_folder(folder / "model")
    tiny.make_images(folder / "one", 1, size=56)
    return folder


def make_parts(workplace: Path, name: str, **changes: Any) -> Parts:
    options = {
        "method": SECTIONS[name],
        "optimizer__learning_rate": RATES[name],
        "data__instance_data_dir": str(workplace / "one"),
        "train__train_batch_size": 1,
        **changes,
    }
    return assemble(build_recipe(tiny.make_recipe(workplace, **options)), DistributedContext())


def train(parts: Parts, steps: range, *, fixed: bool = False) -> list[float]:
    losses = []
    for step in steps:
        batch = parts.prepare(parts.engine.to_device(parts.feed.batch(0 if fixed else step)))
        loss = parts.engine.backward(batch)
        assert torch.isfinite(loss.total)
        parts.engine.step({name: rate(step) for name, rate in parts.rates.items()}, step + 1)
        losses.append(float(loss.total))
    return losses


@pytest.mark.parametrize("name", GRADIENT)
def test_one_image_is_learned_and_every_trainable_parameter_changes(workplace: Path, name: str) -> None:
    parts = make_parts(workplace, name)
    before = {key: tensor.clone() for key, tensor in parts.method.state().items()}
    batch = parts.feed.batch(0)
    if workplace.name == "sdxl":
        assert batch["time_ids"].tolist() == [[56, 56, 0, 0, 32, 32]]
    losses = train(parts, range(12), fixed=True)
    assert losses[-1] < losses[0] * 0.995, losses
    assert not [key for key, tensor in parts.method.state().items() if torch.equal(tensor, before[key])]
    if workplace.name == "sdxl" and name == "textual_inversion":
        assert before.keys() == {"vectors", "vectors_2"}
    if workplace.name == "sdxl" and name == "prompt_tuning":
        assert before.keys() == {"positive", "positive_2", "negative", "negative_2"}


@pytest.mark.parametrize("name", GRADIENT)
def test_a_resumed_run_equals_an_uninterrupted_one(workplace: Path, name: str) -> None:
    changes = {"data__center_crop": False, "data__random_flip": True}
    straight = make_parts(workplace, name, **changes)
    losses = train(straight, range(4))
    first = make_parts(workplace, name, **changes)
    assert train(first, range(2)) == losses[:2]
    second = make_parts(workplace, name, **changes)
    second.engine.load_weights({key: tensor.clone() for key, tensor in first.engine.weights().items()})
    second.engine.load_state(first.engine.state())
    assert train(second, range(2, 4)) == losses[2:]
    found, expected = second.method.state(), straight.method.state()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", ["dreambooth", "native"])
def test_checkpoints_generate_equal_images_in_diffusers(workplace: Path, name: str, tmp_path: Path) -> None:
    parts = make_parts(workplace, name)
    train(parts, range(1))
    paths = parts.method.export(
        Export(tmp_path, "x", formats=["diffusers", "safetensors"], step=1, metadata={}, precision="fp32")
    )
    learned = parts.method.state()
    pipeline = stock_pipeline(tmp_path / "diffusers", workplace.name)
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "negative_prompt": "ugly"}
    theirs = pipeline("a cat", generator=torch.Generator().manual_seed(3), **options).images[0]
    for path in paths:
        if path.suffix == ".yaml":
            continue
        model = load(path)
        for part, module in model.modules().items():
            state = module.state_dict()
            mine = {key: tensor for key, tensor in learned.items() if key.startswith(f"{part}.")}
            assert all(torch.equal(state[key.removeprefix(f"{part}.")], t) for key, t in mine.items())
        ours = generate(model, ["a cat"], seeds=[3], negative_prompt="ugly", steps=4, guidance_scale=5)[0]
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1, path


def test_embeddings_round_trip_and_load_in_diffusers(workplace: Path, tmp_path: Path) -> None:
    parts = make_parts(workplace, "textual_inversion")
    train(parts, range(1))
    method = parts.method
    paths = method.export(
        Export(tmp_path, "thing", formats=["pt", "safetensors"], step=1, metadata={}, precision="fp32")
    )
    learned = list(method.state().values())
    for path in paths:
        found = read_embedding(path)
        tables = [found.vectors, found.vectors_2][: len(learned)]
        assert all(torch.equal(one, other) for one, other in zip(tables, learned, strict=True)), path
    pipeline = stock_pipeline(workplace / "model", workplace.name)
    if workplace.name == "sdxl":
        from safetensors.torch import load_file

        state = load_file(tmp_path / "thing.safetensors")
        sides = {"clip_l": (pipeline.text_encoder, pipeline.tokenizer)}
        sides["clip_g"] = (pipeline.text_encoder_2, pipeline.tokenizer_2)
        for key, (encoder, tokenizer) in sides.items():
            pipeline.load_textual_inversion(
                state[key], token="<thing>", text_encoder=encoder, tokenizer=tokenizer
            )
    else:
        pipeline.load_textual_inversion(str(tmp_path / "thing.safetensors"))
    model = load(workplace / "model")
    install_embedding(model, "<thing>", *learned)
    ours = generate(model, ["a <thing>"], seeds=[3], negative_prompt="ugly", steps=4, guidance_scale=5)[0]
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "negative_prompt": "ugly"}
    theirs = pipeline("a <thing>", generator=torch.Generator().manual_seed(3), **options).images[0]
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_a_pair_of_embeddings_samples_as_trained(workplace: Path, tmp_path: Path) -> None:
    parts = make_parts(workplace, "prompt_tuning")
    train(parts, range(1))
    parts.method.export(
        Export(tmp_path, "thing", formats=["safetensors"], step=1, metadata={}, precision="fp32")
    )
    model = load(workplace / "model")
    for install, ending in ((install_embedding, ""), (install_negative, "-neg")):
        found = read_embedding(tmp_path / f"thing{ending}.safetensors")
        install(model, "<thing>", found.vectors, found.vectors_2)
    drawn = [
        generate(each, ["a <thing>"], seeds=[3], steps=3, guidance_scale=3)[0]
        for each in (model, parts.model)
    ]
    assert np.array_equal(*map(np.asarray, drawn))


def test_a_hypernetwork_has_layers_for_every_context(workplace: Path, tmp_path: Path) -> None:
    parts = make_parts(workplace, "hypernetwork")
    (path,) = parts.method.export(Export(tmp_path, "x", step=1, metadata={}, precision="fp32"))
    widths = [32, 72] if workplace.name == "sdxl" else [32]
    assert sorted(read_hypernetwork(path).weights) == widths


def test_aesthetic_gradients_require_sd1(workplace: Path) -> None:
    with pytest.raises(ModelError, match="Stable Diffusion 1"):
        make_parts(workplace, "aesthetic_gradients")


def test_each_text_encoder_has_its_rate_and_only_used_layers_train(tmp_path: Path) -> None:
    tiny_family("sdxl").save_folder(tmp_path / "model")
    tiny.make_images(tmp_path / "one", 1)
    rates = {"optimizer__learning_rate": 1e-3, "optimizer__text_encoder_lr": 1e-4}
    parts = make_parts(tmp_path, "dreambooth", **rates, optimizer__learning_rate_te2=1e-5)
    assert {name: rate(0) for name, rate in parts.rates.items()} == {
        "unet": 1e-3,
        "text_encoder": 1e-4,
        "text_encoder_2": 1e-5,
    }
    groups = {group.name: group.params for group in parts.method.groups()}
    assert not [name for name in groups["text_encoder"] if "final_layer_norm" in name or "layers.2." in name]
    assert {name for name in groups["text_encoder_2"] if "final_layer_norm" in name or "layers.2." in name}
    parts.engine.backward(parts.prepare(parts.feed.batch(0)))
    assert not [name for params in groups.values() for name, param in params.items() if param.grad is None]
    one = make_parts(tmp_path, "dreambooth", **rates)
    assert one.rates["text_encoder_2"](0) == 1e-4


@pytest.mark.parametrize("name", ["dreambooth", "hypernetwork", "textual_inversion"])
def test_a_memory_plan_of_sdxl_equals_a_real_step(tmp_path: Path, name: str) -> None:
    tiny_family("sdxl").save_folder(tmp_path / "model")
    changes = {"method": SECTIONS[name], "train__train_batch_size": 4}
    parts, counted = engine_parts.make_parts(tmp_path, **changes), plans.count(tmp_path, **changes)
    batch = parts.prepare(parts.feed.batch(0))  # cached prompt encodings are counted separately
    assert counted.full == plans.trace_real_step(parts)
    if not parts.method.trains_text:
        told = sum(batch[key][0].nbytes for key in ("context", "pooled", "time_ids"))
        assert counted.text_embeddings == 6 * told  # at most as many prompts as images


@pytest.mark.parametrize("family", ["sd2-v", "sdxl"])
def test_a_run_trains_with_zero_terminal_snr(tmp_path: Path, family: str) -> None:
    tiny_family(family).save_folder(tmp_path / "model")
    tree = tiny.make_recipe(tmp_path, method={"name": "native"}, train__snr_gamma=5.0)
    tree["model"] |= {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    parts = assemble(build_recipe(tree), DistributedContext())
    batch = parts.prepare(parts.feed.batch(0))
    batch["timesteps"] = torch.tensor([999, 500])
    assert torch.isfinite(parts.method(batch).total)
    (path,) = parts.method.export(
        Export(tmp_path, "x", formats=["diffusers"], step=1, metadata={}, precision="fp32")
    )
    pipeline = stock_pipeline(path, family)
    assert pipeline.scheduler.config.rescale_betas_zero_snr
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "negative_prompt": "ugly"}
    theirs = pipeline("a cat", generator=torch.Generator().manual_seed(3), **options).images[0]
    ours = generate(load(path), ["a cat"], seeds=[3], negative_prompt="ugly", steps=4, guidance_scale=5)[0]
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_class_images_of_sdxl_train_with_their_own_sizes(tmp_path: Path) -> None:
    tiny_family("sdxl").save_folder(tmp_path / "model")
    section = {"name": "dreambooth", "with_prior_preservation": True, "num_class_images": 4}
    classes = tiny.make_images(tmp_path / "class", 4, size=64)
    parts = make_parts_of_six(tmp_path, method=section, data__class_data_dir=str(classes))
    batch = parts.feed.batch(0)
    assert batch["time_ids"].tolist() == [[48, 48, 0, 0, 32, 32]] * 2 + [[64, 64, 0, 0, 32, 32]] * 2
    assert torch.isfinite(parts.method(parts.prepare(batch)).total)


def make_parts_of_six(folder: Path, **changes: Any) -> Parts:
    return assemble(build_recipe(tiny.make_recipe(folder, **changes)), DistributedContext())


def test_images_in_half_precision_are_close() -> None:
    drawn = [
        np.asarray(generate(model, ["a cat"], seeds=[1], steps=3, guidance_scale=3)[0]).astype(int)
        for model in (tiny_family("sdxl"), tiny_family("sdxl").to("cpu", torch.bfloat16))
    ]
    assert 0 < np.abs(drawn[0] - drawn[1]).mean() < 6


def test_check_names_the_family(workplace: Path) -> None:
    tree = tiny.make_recipe(workplace, data__instance_data_dir=str(workplace / "one"))
    lines = {line.name: line for line in check_run(build_recipe(tree))}
    title = "SDXL" if workplace.name == "sdxl" else "Stable Diffusion 2"
    kind = "v_prediction" if workplace.name == "sd2-v" else "epsilon"
    assert all(line.ok for line in lines.values())
    assert f"({title}, {kind}, 32 px)" in lines["model"].detail
