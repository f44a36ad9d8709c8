"""Scores of runs, artifacts and folders of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from colour_scorer import GREEN, HALF, RED, YELLOW, ColourScorer, plain
from PIL import Image
from tiny_models import tiny_model

from dreamfleet.datasets.errors import DataError, UserError
from dreamfleet.trainers.evaluation import score as score_module
from dreamfleet.trainers.evaluation.fidelity import (
    ScoredImages,
    clip_i,
)
from dreamfleet.trainers.evaluation.score import score_run, words_to_strip
from dreamfleet.trainers.models.formats.embedding import Embedding, write_embedding
from dreamfleet.trainers.models.vision.clip import ClipScorer, load_clip
from dreamfleet.trainers.recipe import build_recipe


def test_the_pocket_clip_scores_a_folder(root: Path) -> None:
    clip = load_clip("pocket")
    cats = [Image.open(path) for path in sorted((root / "examples/cat/holdout").glob("*.png"))]
    if not cats:
        pytest.skip("no example images")
    assert isinstance(clip, ClipScorer)
    assert clip_i(ScoredImages(cats, real=cats, clip=clip)).mean() > 0
    assert score_run(root / "examples/cat/holdout", real=str(root / "examples/cat/train"))["num_real"] == 6


@pytest.fixture
def by_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_module, "load_clip", lambda name: ColourScorer())


def save_all(folder: Path, images: list[Image.Image], captions: list[str] | None = None) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
        if captions:
            (folder / f"{number}.txt").write_text(captions[number])
    return folder


@pytest.mark.usefixtures("by_colour")
def test_a_folder_is_scored_with_captions_or_prompts(tmp_path: Path) -> None:
    real = save_all(tmp_path / "real", plain(RED, GREEN))
    generated = save_all(tmp_path / "generated", plain(RED, YELLOW), ["red cat", "green cat"])
    scores = score_run(generated, real=str(real))
    assert (scores["kind"], scores["clip_i"]) == ("pictures", pytest.approx((1 + 2 * HALF) / 4))
    assert scores["clip_t"] == pytest.approx((1 + HALF) / 2)
    assert scores["clip_i_among_real"] == pytest.approx(0, abs=1e-6)
    assert [entry["prompt"] for entry in scores["prompts"]] == ["red cat", "green cat"]
    assert score_run(str(generated), prompts=["blue"])["clip_t"] == pytest.approx(0)
    json.dumps(scores, allow_nan=False)
    with pytest.raises(UserError, match="real image"):
        score_run(real)
    with pytest.raises(UserError, match="nothing"):
        score_run(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        score_run(tmp_path / "empty", real=str(real))


def recipe_of(tmp_path: Path, model: Path, real: Path, **method: Any) -> dict[str, Any]:
    return {
        "method": method,
        "model": {"pretrained_model_name_or_path": str(model)},
        "data": {
            "instance_data_dir": str(real),
            "instance_prompt": "a photo of sks cat",
            "class_prompt": "a photo of a cat",
            "resolution": 32,
        },
        "validation": {"prompts": ["red qzx", "green qzx"], "num_inference_steps": 2, "guidance_scale": 1},
        "output_dir": str(tmp_path / "my-run"),
    }


@pytest.mark.usefixtures("by_colour")
@pytest.mark.parametrize("form", ["diffusers", ".safetensors"])
def test_a_dreambooth_run_is_scored_by_its_exports(form: str, tmp_path: Path) -> None:

    real = save_all(tmp_path / "real", plain(RED, GREEN))
    run = tmp_path / "my-run"
    (run / "exports").mkdir(parents=True)
    tree = recipe_of(tmp_path, tmp_path / "gone", real, name="dreambooth")
    (run / "recipe.yaml").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="exports/"):
        score_run(run)
    if form == "diffusers":
        tiny_model().save_folder(run / "exports" / "diffusers")
    else:
        tiny_model().save_file(run / "exports" / f"my-run{form}")
    (run / "summary.json").write_text(json.dumps({"figures": {"holdout_loss": 0.25}}))
    scores = score_run(run, num_images=2, seed=5)
    assert (scores["kind"], scores["method"], scores["real"]) == ("run", "dreambooth", "training pictures")
    assert (scores["num_pictures"], scores["num_real"], scores["holdout_loss"]) == (4, 2, 0.25)
    assert scores == score_run(run, num_images=2, seed=5)
    assert -1 <= scores["clip_t"] <= 1
    assert [entry["prompt"] for entry in scores["prompts"]] == ["red qzx", "green qzx"]
    assert score_run(run, num_images=1, prompts=["red"], real=str(real))["num_pictures"] == 1
    assert words_to_strip(build_recipe(tree)) == {"sks": ""}


@pytest.mark.usefixtures("by_colour")
def test_a_textual_inversion_run_is_scored_with_its_placeholder(tmp_path: Path) -> None:
    tiny_model().save_folder(tmp_path / "base")
    real = save_all(tmp_path / "real", plain(RED))
    run = tmp_path / "my-run"
    (run / "exports").mkdir(parents=True)
    method = {"name": "textual_inversion", "placeholder_token": "qzx", "initializer_token": "cat"}
    tree = recipe_of(tmp_path, tmp_path / "base", real, **method)
    (run / "recipe.yaml").write_text(json.dumps(tree))
    generated = []
    for seed in (0, 1):
        vectors = 5 * torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))
        write_embedding(Embedding("my-run", vectors), run / "exports" / "my-run.pt")
        generated.append(score_run(run, num_images=1))
    assert generated[0]["prompts"] != generated[1]["prompts"]
    assert words_to_strip(build_recipe(tree)) == {"qzx": "cat"}


@pytest.mark.usefixtures("by_colour")
def test_an_artifact_is_scored_with_its_run_or_with_a_model(tmp_path: Path) -> None:
    tiny_model().save_folder(tmp_path / "base")
    real = save_all(tmp_path / "real", plain(RED))
    exports = tmp_path / "my-run" / "exports"
    exports.mkdir(parents=True)
    method = {"name": "textual_inversion", "placeholder_token": "qzx", "initializer_token": "cat"}
    tree = recipe_of(tmp_path, tmp_path / "base", real, **method)
    (tmp_path / "my-run" / "recipe.yaml").write_text(json.dumps(tree))
    vectors = 5 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    for name in ("my-run.pt", "my-run.safetensors"):
        write_embedding(Embedding("my-run", vectors), exports / name)
    run = score_run(tmp_path / "my-run", num_images=1)
    for name in ("my-run.pt", "my-run.safetensors"):
        of_run = score_run(exports / name, num_images=1)
        assert of_run == {**run, "target": str(exports / name), "kind": "artefact"}
    elsewhere = exports.parent.parent / "a" / "wrd.pt"
    elsewhere.parent.mkdir()
    write_embedding(Embedding("wrd", vectors), elsewhere)
    base = str(tmp_path / "base")
    lone = score_run(elsewhere, num_images=1, model=base)
    assert (lone["kind"], lone["prompts"][0]["prompt"]) == ("artefact", "a photo of wrd")
    plainly = score_run(base, prompts=["red wrd"], num_images=1, real=str(real))
    taught = score_run(elsewhere, prompts=["red wrd"], num_images=1, real=str(real), model=base)
    assert taught["clip_i"] != plainly["clip_i"]  # the word was generated with


@pytest.mark.usefixtures("by_colour")
def test_a_hypernetwork_is_scored_with_a_model_and_prompts(tmp_path: Path) -> None:
    from dreamfleet.trainers.config.hypernetwork_structure import Structure
    from dreamfleet.trainers.models.formats.hypernetwork import write_hypernetwork
    from dreamfleet.trainers.models.stable_diffusion.hypernetwork import Hypernetwork

    model = tiny_model()
    model.save_folder(tmp_path / "base")
    network = Hypernetwork((model.context_width,), Structure())
    with torch.no_grad():
        for weights in network.parameters():
            weights.normal_()
    path = write_hypernetwork(network.to_file("h"), tmp_path / "h.pt")
    base = str(tmp_path / "base")
    with pytest.raises(UserError, match="--prompt"):
        score_run(path, model=base)
    asked: Any = {"prompts": ["red"], "num_images": 1, "real": str(save_all(tmp_path / "real", plain(RED)))}
    assert score_run(path, model=base, **asked)["clip_i"] != score_run(base, **asked)["clip_i"]


@pytest.mark.usefixtures("by_colour")
def test_a_model_is_scored_with_prompts(tmp_path: Path) -> None:
    tiny_model().save_folder(tmp_path / "model")
    with pytest.raises(UserError, match="--prompt"):
        score_run(tmp_path / "model")
    scores = score_run(tmp_path / "model", prompts=["red"], num_images=1)
    assert (scores["kind"], scores["num_pictures"]) == ("model", 1)
