"""Test the method Hypernetwork: gradients, recipe, hypernetworks named in prompts, and commands on a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny_models import WIDTH, tiny_model
from torch import Tensor
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import RecipeError, UserError
from dreamfleet.trainers.batches.feed import to_samples
from dreamfleet.trainers.config.hypernetwork_structure import Structure
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.evaluation.previews import generate_previews
from dreamfleet.trainers.models.formats.hypernetwork import write_hypernetwork
from dreamfleet.trainers.models.sampling.prompt_syntax import split_tags
from dreamfleet.trainers.models.sampling.prompt_tags import (
    HypernetworkFiles,
    LoraFiles,
    PromptFiles,
    read_tag,
    split_multiplier,
)
from dreamfleet.trainers.models.stable_diffusion.hypernetwork import Hypernetwork, applied_hypernetworks
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts, assemble


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model, images, and two hypernetworks, `one.pt` and `two.pt`."""
    folder = tmp_path_factory.mktemp("hypernetworks")
    tiny.make_recipe(folder)
    for name in ("one", "two"):
        write_hypernetwork(Hypernetwork([WIDTH], Structure()).to_file(name), folder / f"{name}.pt")
    return folder


def make_parts(folder: Path, **changes: Any) -> Parts:
    section = {"name": "hypernetwork", "weight_init": "XavierNormal", "activation_func": "relu"}
    section |= changes.pop("method", {})
    return assemble(build_recipe(tiny.make_recipe(folder, method=section, **changes)), DistributedContext())


def gradients(parts: Parts) -> dict[str, Tensor]:
    parts.method(parts.prepare(parts.feed.batch(0))).total.backward()
    (group,) = parts.method.groups()
    found = {name: param.grad for name, param in group.params.items()}
    assert all(grad is not None and grad.any() for grad in found.values())
    return {name: grad for name, grad in found.items() if grad is not None}


def test_gradient_checkpointing_does_not_change_gradients(workplace: Path) -> None:
    dropping = {"layer_structure": "1, 2, 2, 1", "use_dropout": True}
    found = []
    for checkpointing in (False, True):
        parts = make_parts(workplace, method=dropping, train__gradient_checkpointing=checkpointing)
        torch.manual_seed(3)
        found.append(gradients(parts))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-7) for name in found[0])


def test_every_parameter_gets_a_gradient(workplace: Path) -> None:
    parts = make_parts(workplace, train__gradient_checkpointing=True)
    for step in range(2):
        parts.method(parts.prepare(parts.feed.batch(step))).total.backward()
        assert all(param.grad is not None for param in parts.engine.params.values())
        parts.engine.drop_gradients()


def test_dropout_is_off_during_validation(workplace: Path) -> None:
    dropping = {"layer_structure": [1, 2, 1], "use_dropout": True, "dropout_structure": [0, 0.9, 0]}
    validation = {"prompts": ["a cat"], "num_images": 1, "num_inference_steps": 1}
    parts = make_parts(workplace, method=dropping, validation=validation)
    config = build_recipe(tiny.make_recipe(workplace, validation=validation)).validation
    sampled = [generate_previews(parts.method, parts.engine, config, tiny.RESOLUTION)[0][0] for _ in range(2)]
    assert sampled[0].tobytes() == sampled[1].tobytes()
    assert parts.method.training and parts.method.network.training


def test_the_recipe_sets_widths_strength_and_prompts(workplace: Path) -> None:
    parts = make_parts(
        workplace, method={"enable_sizes": "32", "scale": 0.5, "template_file": "hypernetwork"}
    )
    method = parts.method
    assert method.network.widths == [32]
    assert applied_hypernetworks(parts.model.unet) == [(method.network, 0.5)]
    sample = to_samples(parts.sets.instances)[0]._replace(caption="grey cat")
    config = build_recipe(tiny.make_recipe(workplace)).data
    assert "grey cat" in method.prompt(sample, np.random.default_rng(0), config)
    plain = make_parts(workplace).method
    assert plain.network.widths == [16, 32]
    assert plain.prompt(sample, np.random.default_rng(0), config) == "grey cat"
    bare = sample._replace(caption=None)
    assert plain.prompt(bare, np.random.default_rng(0), config) == "a photo of sks cat"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"enable_sizes": [32, 768]}, r"\[768\].*\[16, 32\]"),
        ({"layer_structure": "1, 2"}, "first .*last"),
        ({"activation_func": "reul"}, "linear, relu"),
        ({"activation_func": "reul", "layer_structure": "1, 1"}, "linear, relu"),
        ({"weight_init": "Uniform"}, "XavierUniform"),
        ({"dropout_structure": [0, 0.3, 0]}, "use_dropout"),
        ({"use_dropout": True, "dropout_structure": "0, 0.3"}, "end with 0"),
        ({"use_dropout": True, "dropout_structure": "0, 0.3, 0, 0"}, "3 entries"),
        ({"multiplier": 0}, "greater than 0"),
        ({"template_file": "style"}, "no placeholder"),
    ],
)
def test_an_invalid_section_is_an_error(section: dict[str, Any], message: str, workplace: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        make_parts(workplace, method=section)


def test_tags_and_arguments_are_split_as_in_the_webui() -> None:
    for tag, expected in (
        ("<hypernet:look:0.8>", ("look", (0.8, 0.8))),
        ("<lora:b c>", ("b c", (1, 1))),
        ("<lora:x:0.5:0.7>", ("x", (0.5, 0.7))),
        ("<lora:x:te=0.5:unet=0.7>", ("x", (0.5, 0.7))),
        ("<lora:x:unet=0.7>", ("x", (1, 0.7))),
        ("<lora:x:0.5:te=2>", ("x", (2, 2))),
        ("<lora:x:0.8:dyn=4>", ("x", (0.8, 0.8))),
        ("<lora:x:1:1:4>", ("x", (1, 1))),
    ):
        assert read_tag(split_tags(tag)[1][0]) == expected, tag
    for wrong in ("<hypernet:look:much>", "<hypernet: >", "<hypernet:look:nan>", "<hypernet:look:1:x>"):
        with pytest.raises(UserError, match="<hypernet:NAME"):
            read_tag(split_tags(wrong)[1][0])
    assert split_multiplier("a/look.pt:0.8") == ("a/look.pt", 0.8)
    assert split_multiplier("s3://bucket/look.pt") == ("s3://bucket/look.pt", 1.0)
    assert split_multiplier("s3://bucket/look.pt:-1") == ("s3://bucket/look.pt", -1.0)


def test_names_are_resolved_in_the_folder_and_beside_files(workplace: Path, tmp_path: Path) -> None:
    one, two = str(workplace / "one.pt"), str(workplace / "two.pt")
    files = HypernetworkFiles([f"{one}:0.5"])
    for prompt, expected in (
        ("a cat", ((one, (0.5, 0.5)),)),
        ("a cat <hypernet:two:2>", ((one, (0.5, 0.5)), (two, (2, 2)))),
        ("<hypernet:one:2> a cat", ((one, (2, 2)),)),
    ):
        prompt_files = PromptFiles(files, LoraFiles())
        assert prompt_files.select(prompt) == ("a cat", (expected, ()))
        assert prompt_files.select(prompt, plain=True) == (prompt, (((one, (0.5, 0.5)),), ()))
    assert HypernetworkFiles(folder=str(workplace)).find("two") == two
    model = tiny_model()
    assert files.load(two, model) is files.load(two, model)
    with pytest.raises(UserError, match=r"none\.pt .*one, two"):
        files.find("none")
    with pytest.raises(UserError, match="--hypernetwork-dir"):
        HypernetworkFiles().find("one")
    for given, folder, message in [
        (["none.pt"], None, "none.pt"),
        ([], str(tmp_path / "gone"), "gone"),
    ]:
        with pytest.raises(UserError, match=message):
            HypernetworkFiles(given, folder)


def command(*words: Any) -> Any:
    return CliRunner().invoke(program.app, [str(word) for word in words])


def test_a_run_samples_exports_converts_and_scores(tmp_path: Path) -> None:
    section = {"name": "hypernetwork", "weight_init": "KaimingNormal", "multiplier": 0.5}
    tree = tiny.make_recipe(tmp_path, method=section, train__max_train_steps=1)
    assert command("train", tiny.write_recipe(tmp_path / "r.yaml", tree)).exit_code == 0
    run, model = tmp_path / "run", tmp_path / "model"
    made = run / "exports" / "run.pt"
    assert f"--hypernetwork exports/{made.name}:0.5" in (run / "report.html").read_text()
    options = ["--num-images", 1, "--steps", 2, "--json"]

    def sample(prompt: str, *words: Any) -> Any:
        out = tmp_path / "sampled.png"
        result = command("sample", "--prompt", prompt, *words, *options, "--out", out)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["pictures"] == [{"prompt": prompt, "seed": 0}]
        return np.asarray(Image.open(out)).astype(int)

    plain, tuned = sample("a cat", "--model", model), sample("a cat", "--model", run)
    assert np.abs(tuned - plain).max() > 3
    given = sample("a cat", "--model", model, "--hypernetwork", f"{made}:0.5")
    named = sample("a cat <hypernet:run:0.5>", "--model", model, "--hypernetwork-dir", made.parent)
    twice = sample("a cat <hypernet:run:0.5>", "--model", run, "--hypernetwork-dir", made.parent)
    assert np.array_equal(given, tuned) and np.array_equal(named, tuned)
    assert np.abs(twice - tuned).max() > 1, "a run's own hypernetwork stays when a prompt adds one"
    wrong = command("sample", "--prompt", "<hypernet:x>", "--hypernetwork-dir", made.parent, "--model", model)
    assert wrong.exit_code == 2 and "no x.pt" in wrong.output

    torch.save(torch.load(made, weights_only=True), tmp_path / "torch.pt")  # rejected by the webui
    assert command("convert", tmp_path / "torch.pt", tmp_path / "again.pt").exit_code == 0
    again = sample("a cat", "--model", model, "--hypernetwork", f"{tmp_path / 'again.pt'}:0.5")
    assert np.array_equal(again, tuned)
    assert command("convert", made, tmp_path / "a.safetensors").exit_code == 2
    out = tmp_path / "exported"
    assert command("export", run, "--format", "pt", "--out", out).exit_code == 0
    assert (out / "run.pt").read_bytes() == made.read_bytes()
    scores = command("score", run, "--num-images", 1, "--json")
    assert scores.exit_code == 0 and json.loads(scores.stdout)["method"] == "hypernetwork"
