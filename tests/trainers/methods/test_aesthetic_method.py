"""Test the method Aesthetic Gradients: the vector is the plain mean for any batches, resumes and workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import RecipeError, UserError
from dreamfleet.trainers.batches.plan_share import PlanShare
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.memory.profile import method_shape
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.models.family import load_model
from dreamfleet.trainers.models.formats.aesthetic import read_aesthetic
from dreamfleet.trainers.models.vision.clip import load_clip
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts, assemble
from dreamfleet.trainers.run.run import run_worker

SECTION = {"name": "aesthetic_gradients", "aesthetic_steps": 3, "aesthetic_lr": 1e-2}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and six images, shared by the tests."""
    folder = tmp_path_factory.mktemp("aesthetic")
    tiny.make_recipe(folder)
    return folder


def plain_mean(workplace: Path) -> torch.Tensor:
    """Return the mean of unnormalised CLIP features as in the webui's extension, of shape (1, features)."""
    clip = load_clip(workplace / "model")
    images = [Image.open(path) for path in sorted((workplace / "pictures").glob("*.png"))]
    return clip.embed(clip.preprocessing(images)).mean(dim=0, keepdim=True)


def recipe_tree(workplace: Path, **changes: Any) -> dict[str, Any]:
    options = {"method": SECTION, "train__max_train_steps": None, "train__num_train_epochs": 1, **changes}
    return tiny.make_recipe(workplace, **options)


def walk(parts: Parts, steps: range) -> None:
    for step in steps:
        for micro in parts.engine.units:
            last = micro == parts.engine.units[-1]
            parts.engine.backward(parts.prepare(parts.feed.batch(step, micro)), last=last)
        parts.engine.step({name: rate(step) for name, rate in parts.rates.items()}, step + 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"train__train_batch_size": 2},
        {"train__train_batch_size": 4},  # the second batch continues into the next epoch
        {"train__train_batch_size": 1, "train__gradient_accumulation_steps": 4},
        {"train__train_batch_size": 4, "train__num_train_epochs": 3},
        {"train__train_batch_size": 8, "optimizer__max_grad_norm": 1e-3, "optimizer__lr_scheduler": "cosine"},
    ],
)
def test_the_vector_is_the_plain_mean_for_any_batches(changes: dict[str, Any], workplace: Path) -> None:
    parts = assemble(build_recipe(recipe_tree(workplace, **changes)), DistributedContext())
    walk(parts, range(parts.schedule.total))
    assert torch.allclose(parts.method.vector, plain_mean(workplace), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 1])
def test_two_workers_share_the_images(rank: int, workplace: Path) -> None:
    """Test that the engine's average of two workers' halves of a step equals the step of one worker."""
    alone = assemble(
        build_recipe(recipe_tree(workplace, train__train_batch_size=4)), DistributedContext()
    ).feed
    half = assemble(build_recipe(recipe_tree(workplace)), DistributedContext(rank=0)).feed
    half.share = PlanShare(alone.plan, 2)
    for step in range(2):
        whole, mine = alone.batch(step), half.batch(step, rank)
        for name in ("clip_pixels", "counted"):
            assert torch.equal(mine[name], whole[name][2 * rank : 2 * rank + 2])


def test_every_parameter_gets_a_gradient(workplace: Path) -> None:
    parts = assemble(build_recipe(recipe_tree(workplace)), DistributedContext())
    for step in range(2):
        parts.method(parts.prepare(parts.feed.batch(step))).total.backward()
        assert all(param.grad is not None for param in parts.engine.params.values())
        parts.engine.drop_gradients()


def test_a_resumed_run_writes_the_same_file(workplace: Path) -> None:
    for name in ("straight", "broken"):
        tree = recipe_tree(workplace, output_dir=str(workplace / name / "taste"), train__train_batch_size=1)
        if name == "broken":
            first = run_worker(build_recipe(tree), should_stop=tiny.Stop(2))
            assert first.exit_reason == "interrupted" and 0 < first.steps < 6
        last = run_worker(build_recipe(tree), resume=name == "broken")
        assert last.exit_reason == "completed" and last.steps == 6
    files = [workplace / name / "taste/exports/taste.pt" for name in ("straight", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert torch.allclose(read_aesthetic(files[0]), plain_mean(workplace), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("key", "value"), [("use_ema", True), ("zero_stage", 2)])
def test_an_engine_that_averages_or_shards_is_refused(key: str, value: Any, workplace: Path) -> None:
    with pytest.raises(RecipeError, match=f"engine.{key}: {value}.*aesthetic_gradients"):
        assemble(build_recipe(recipe_tree(workplace, engine={key: value})), DistributedContext())


def test_a_memory_plan_is_refused_because_no_weights_are_trained(workplace: Path) -> None:
    with pytest.raises(UserError, match="weights"):
        method_shape(build_recipe(recipe_tree(workplace)))


def test_settings_that_previews_refuse_are_recipe_errors(workplace: Path) -> None:
    for section in ({"aesthetic_weight": 2}, {"aesthetic_slerp": "sideways"}, {"aesthetic_steps": -1}):
        with pytest.raises(RecipeError, match=next(iter(section))):
            build_recipe(recipe_tree(workplace, method={**SECTION, **section}))


def test_the_baked_form_is_a_separate_model(workplace: Path, tmp_path: Path) -> None:
    section = {**SECTION, "baked_prompts": ["a cat", "a dog"]}
    parts = assemble(build_recipe(recipe_tree(workplace, method=section)), DistributedContext())
    walk(parts, range(1))
    options = {"formats": ["diffusers"], "step": 1, "metadata": {}, "precision": "fp32"}
    (path,) = parts.method.export(Export(tmp_path, "taste", **options))
    model = load_model(ModelConfig(pretrained_model_name_or_path=str(path)))
    plain = parts.model.encode_text(parts.model.tokenize(["a cat"]))
    baked, apart = model.encode_text(model.tokenize(["a cat"])), parts.method.encode(["a cat"]).context
    assert (baked - apart).norm() < (plain - apart).norm()
    assert 0 < json.loads((path / "baked.json").read_text())["difference"] < 1


def command(*words: Any) -> Any:
    return CliRunner().invoke(program.app, [str(word) for word in words])


def test_a_run_samples_exports_and_scores(workplace: Path, tmp_path: Path) -> None:
    validation = {
        "prompts": ["a cat"],
        "num_images": 1,
        "num_inference_steps": 2,
        "holdout": str(workplace / "pictures"),
        "holdout_timesteps": 2,
    }
    tree = recipe_tree(workplace, validation=validation, output_dir=str(tmp_path / "run"))
    recipe = tiny.write_recipe(tmp_path / "r.yaml", tree)
    assert command("check", recipe).exit_code == 0
    trained = command("train", recipe)
    assert trained.exit_code == 0, trained.output
    run, model = tmp_path / "run", workplace / "model"
    made = run / "exports" / "run.pt"
    assert "--aesthetic exports/run.pt" in (run / "report.html").read_text()
    first, last = (np.asarray(Image.open(run / f"samples/step-00000{n}.png")).astype(int) for n in (0, 3))
    assert np.abs(first - last).max() > 3
    losses = [
        json.loads(line).get("holdout_loss") for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    measured = [loss for loss in losses if loss is not None]
    assert len(measured) == 2 and measured[0] != measured[1]

    def sample(*words: Any) -> tuple[Any, Any]:
        out = tmp_path / "sampled.png"
        result = command(
            "sample", "--prompt", "a cat", "--num-images", 1, "--steps", 2, "--json", *words, "--out", out
        )
        assert result.exit_code == 0, result.output
        return np.asarray(Image.open(out)).astype(int), json.loads(result.stdout)["pictures"][0]

    strength = ["--aesthetic-steps", 3, "--aesthetic-lr", 1e-2]
    plain, cell = sample("--model", model)
    assert cell == {"prompt": "a cat", "seed": 0}
    given, cell = sample("--model", model, "--aesthetic", made, *strength)
    assert cell["aesthetic_cosine"][1] > cell["aesthetic_cosine"][0]
    own, _ = sample("--model", run)
    assert np.abs(given - plain).max() > 3 and np.array_equal(given, own)
    knobs = ["--aesthetic-text", "a dog", "--aesthetic-slerp-angle", 0.9, "--aesthetic-text-negative"]
    bent, _ = sample("--model", model, "--aesthetic", made, *strength, *knobs, "--aesthetic-slerp", "tokens")
    assert np.abs(given - bent).max() > 1
    for words, message in ((["none.pt"], "no such file"), ([made, "--aesthetic-weight", 2], "from 0 to 1")):
        wrong = command("sample", "--prompt", "a cat", "--model", model, "--aesthetic", *words)
        assert wrong.exit_code == 2 and message in wrong.output
    out = tmp_path / "exported"
    assert command("export", run, "--format", "pt", "--out", out).exit_code == 0
    assert (out / "run.pt").read_bytes() == made.read_bytes()
    half = tmp_path / "half.pt"
    torch.save(read_aesthetic(made)[0].half(), half)
    assert command("convert", half, tmp_path / "again.pt").exit_code == 0
    assert torch.equal(read_aesthetic(tmp_path / "again.pt"), read_aesthetic(made).half().float())
    assert command("convert", made, tmp_path / "taste.png").exit_code == 2
    refused = command("export", run, "--format", "diffusers", "--out", out)
    assert refused.exit_code == 2 and "baked_prompts" in refused.output
    scores = command("score", run, "--num-images", 1, "--json")
    assert scores.exit_code == 0 and json.loads(scores.stdout)["method"] == "aesthetic_gradients"
