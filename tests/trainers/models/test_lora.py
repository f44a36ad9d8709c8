"""Test LoRA in a run: only its matrices are trained, on every engine; resume, previews, exports, scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from engine_parts import make_parts, take_step
from method_cases import fixed_batches, snapshot
from PIL import Image
from small_runs import assert_same, final_state, recipe_tree
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import RecipeError, UserError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.artifacts.loading import load_exported
from dreamfleet.trainers.config.model import ModelConfig
from dreamfleet.trainers.memory.estimate import CHOICES, estimate
from dreamfleet.trainers.memory.profile import count_run, method_shape
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.models.adapters import adapted
from dreamfleet.trainers.models.family import load_model
from dreamfleet.trainers.models.formats.file_names import DIFFUSERS_LORA
from dreamfleet.trainers.models.formats.lora import read_lora
from dreamfleet.trainers.models.lora import set_loras
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts
from dreamfleet.trainers.run.export import export_run
from dreamfleet.trainers.run.run import run_worker

LORA: dict[str, Any] = {
    "name": "dreambooth",
    "train_text_encoder": True,
    "lora_rank": 4,
    "lora_alpha": 6,
    "lora_dropout": 0.1,
}


def predicted(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        context = model.encode(["a photo of sks cat"]).context
        return model.unet(latents, torch.tensor([500]), context, return_dict=False)[0]


def disturb(parts: Parts) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for param in parts.engine.params.values():
            param.add_(0.1 * torch.randn_like(param))


@pytest.mark.parametrize("name", ["dreambooth", "native"])
def test_the_first_loss_equals_that_of_the_base_model_and_only_matrices_change(
    tmp_path: Path, name: str
) -> None:
    method = {**LORA, "name": name, "lora_dropout": 0, "lora_target_modules": "all-linear"}
    # Checkpointing discards activations, but gradients must reach the matrices through the frozen base model.
    options = {"train__train_batch_size": 1, "train__gradient_checkpointing": True}
    parts = make_parts(tmp_path, method=method, optimizer__learning_rate=1e-3, **options)
    untuned = load_model(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "model")))
    parts.method.eval(), parts.model.unet.eval(), parts.model.text_encoder.eval()
    assert torch.equal(predicted(parts.model), predicted(untuned))
    parts.method.train(), parts.model.unet.train(), parts.model.text_encoder.train()
    assert [group.name for group in parts.engine.groups] == ["unet", "text_encoder"]
    assert all(param.dtype == torch.float32 for param in parts.method.parameters())
    assert {id(p) for p in parts.method.parameters()} == {id(p) for p in parts.engine.params.values()}
    before, learned = snapshot(parts), {name: t.clone() for name, t in parts.method.state().items()}
    assert set(learned) == {name for name in learned if name.endswith(("lora_A.weight", "lora_B.weight"))}
    losses = []
    for batch, step in zip(fixed_batches(parts), range(20), strict=False):
        loss = parts.engine.backward(parts.prepare(parts.engine.to_device(batch)))
        losses.append(float(loss.total))
        parts.engine.step({name: rate(step) for name, rate in parts.rates.items()}, step + 1)
    assert losses[-1] < losses[0] * 0.995, losses
    after = snapshot(parts)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".lora_" in name for name in changed), changed
    assert not [name for name, t in parts.method.state().items() if torch.equal(t, learned[name])]


def test_a_resumed_run_equals_an_uninterrupted_one_with_small_checkpoints(tmp_path: Path) -> None:
    straight = recipe_tree(tmp_path, "straight", method=LORA)
    run_worker(build_recipe(straight))
    broken = recipe_tree(tmp_path, "broken", method=LORA)
    assert run_worker(build_recipe(broken), should_stop=tiny.Stop(2)).exit_reason == "interrupted"
    assert run_worker(build_recipe(broken), resume=True).exit_reason == "completed"
    assert_same(final_state(straight), final_state(broken))
    learned, engine = final_state(straight)
    assert all(".lora_" in name for name in learned) and learned.keys() == engine["ema"].keys()
    run, recipe = Storage(straight["output_dir"]), build_recipe(straight)
    assert sorted(run.list("exports")) == [DIFFUSERS_LORA, "straight.safetensors"]

    # All formats export the EMA weights.
    exported = load_exported(run, recipe)
    assert len(exported.loras) == 1
    expected = predicted(exported)
    untuned = load_model(recipe.model)
    assert not torch.allclose(expected, predicted(untuned), atol=1e-5)
    set_loras(untuned, [(read_lora(run.path("exports", "straight.safetensors")), 1.0)])
    assert torch.allclose(predicted(untuned), expected, atol=1e-5)
    forms = ["diffusers", "safetensors", "kohya_lora"]
    paths = export_run(str(run.path()), forms, str(tmp_path / "out"))
    assert sorted(Path(path).name for path in paths) == [
        "diffusers",
        "straight-merged.safetensors",
        "straight.safetensors",
    ]
    for name in ("diffusers", "straight-merged.safetensors"):
        merged = load_model(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "out" / name)))
        assert torch.allclose(predicted(merged), expected, atol=1e-5), name


def test_alpha_is_right_in_both_layouts_and_training_continues_after_a_merged_export(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, method={**LORA, "lora_dropout": 0})
    disturb(parts)
    parts.model.unet.eval(), parts.model.text_encoder.eval()
    expected = predicted(parts.model)
    parts.method.export(
        Export(tmp_path, "cat", formats=parts.method.all_formats, step=3, metadata={}, precision="fp32")
    )
    assert torch.equal(predicted(parts.model), expected)
    for path in (tmp_path / DIFFUSERS_LORA, tmp_path / "cat.safetensors"):
        found = read_lora(path)
        assert {m.alpha for m in found.layers.values()} == ({4.0} if path.name == DIFFUSERS_LORA else {6.0})
        model = load_model(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "model")))
        set_loras(model, [(found, 1.0)])
        assert torch.allclose(predicted(model), expected, atol=1e-5)
    merged = load_model(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "cat-merged.ckpt")))
    assert torch.allclose(predicted(merged), expected, atol=1e-5)
    assert torch.isfinite(torch.tensor(take_step(parts)))


def test_a_base_model_in_16_bits_keeps_the_matrices_in_float32(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, method={**LORA, "lora_dropout": 0}, train__mixed_precision="bf16")
    parts.model.to("cpu", torch.bfloat16)
    for part in (parts.model.unet, parts.model.text_encoder):
        kinds = {param.requires_grad: param.dtype for param in part.parameters()}
        assert kinds == {False: torch.bfloat16, True: torch.float32} and part.dtype == torch.bfloat16
    disturb(parts)
    before = {name: t.clone() for name, t in parts.method.state().items()}
    loss = parts.engine.backward(parts.prepare(parts.feed.batch(0)))
    assert torch.isfinite(loss.total) and all(p.grad is not None for p in parts.engine.params.values())
    parts.engine.step(dict.fromkeys(parts.rates, 1e-2), 1)
    assert all(not torch.equal(t, before[name]) for name, t in parts.method.state().items())


def test_trainable_parts_can_stay_on_the_host_while_the_frozen_base_moves(tmp_path: Path) -> None:
    for method, waits in ((LORA, False), ({"name": "dreambooth"}, True)):
        model = make_parts(tmp_path, method={**method, "train_text_encoder": False}).model
        model.to("meta", home="cpu")
        assert next(model.unet.parameters()).is_meta != waits and next(model.vae.parameters()).is_meta


def test_targets_select_layers(tmp_path: Path) -> None:
    def names(targets: Any, **changes: Any) -> dict[str, set[str]]:
        method = {**LORA, "lora_target_modules": targets}
        parts = make_parts(tmp_path, method=method, **changes)
        return {
            part: {name for name, _ in adapted(module)}
            for part, module in parts.model.modules().items()
            if part != "vae"
        }

    usual = names(None)
    assert {name.rpartition("attn")[2][2:] for name in usual["unet"]} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert len(usual["text_encoder"]) == 8
    # A layer that clip_skip skips gets no gradient.
    assert len(names(None, model__clip_skip=2)["text_encoder"]) == 4
    linear, locon = names("all-linear"), names("locon")
    assert usual["unet"] < linear["unet"] < locon["unet"]
    assert len(locon["text_encoder"]) == 12
    # kohya's scripts and diffusers 0.32 silently ignore layers outside the blocks.
    blocks = ("down_blocks.", "mid_block.", "up_blocks.")
    assert all(name.startswith(blocks) for name in locon["unet"])
    assert any(name.endswith("conv1") for name in locon["unet"] - linear["unet"])
    assert any(name.endswith("time_emb_proj") for name in linear["unet"])
    assert {"conv_in", "time_embedding.linear_1"} <= names("conv_in, linear_1")["unet"]
    some = names("to_q, conv1")
    assert any(name.endswith("conv1") for name in some["unet"]) and len(some["text_encoder"]) == 8
    assert len(names(["to_q", "fc1"])["text_encoder"]) == 2
    with pytest.raises(RecipeError, match=r"nonsense.*all-linear"):
        names(["to_q", "nonsense"])


def test_keys_of_kohya_are_accepted_and_require_a_rank(tmp_path: Path) -> None:
    kohyas = {"name": "native", "network_dim": 8, "network_alpha": 4, "network_dropout": 0.5}
    method: Any = build_recipe(tiny.make_recipe(tmp_path, method=kohyas)).method
    assert (method.lora_rank, method.lora_alpha, method.lora_dropout) == (8, 4.0, 0.5)
    with pytest.raises(RecipeError, match=r"lora_alpha.*lora_rank"):
        build_recipe(tiny.make_recipe(tmp_path, method={"name": "native", "lora_alpha": 4}))
    with pytest.raises(RecipeError, match=r"'pt'.*kohya_lora"):
        make_parts(tmp_path, method=LORA).method.export(Export(tmp_path, "x", formats=["pt"]))
    parts = make_parts(tmp_path, method={**LORA, "lora_rank": 2})
    with pytest.raises(RecipeError, match="shape"):
        parts.method.load_state(make_parts(tmp_path, method=LORA).method.state())


def test_a_plan_counts_the_matrices_as_trainable(tmp_path: Path) -> None:
    recipe = build_recipe(tiny.make_recipe(tmp_path, method=LORA, engine={"use_ema": True}))
    parts = make_parts(tmp_path, method=LORA, engine={"use_ema": True})
    counts = count_run(recipe, method_shape(recipe), 6)
    learning = sum(param.numel() for param in parts.engine.params.values())
    base = sum(
        param.numel()
        for module in parts.model.modules().values()
        for param in module.parameters()
        if not param.requires_grad
    )
    assert counts.total == learning and counts.frozen >= 4 * base
    lines = estimate(counts, CHOICES[0]).gpu
    whole = build_recipe(
        tiny.make_recipe(tmp_path, method={"name": "dreambooth", "train_text_encoder": True})
    )
    theirs = estimate(count_run(whole, method_shape(whole), 6), CHOICES[0]).gpu
    assert lines["optimizer"] == 8 * learning + 4 * len(counts.learning) < theirs["optimizer"]


def test_a_run_without_its_exports_is_an_error(tmp_path: Path) -> None:
    recipe = build_recipe(tiny.make_recipe(tmp_path, method=LORA))
    run = Storage(tmp_path / "empty")
    run.write_text("exports/run.ckpt", "")
    with pytest.raises(UserError, match="no export"):
        load_exported(run, recipe)


def command(*words: Any) -> Any:
    return CliRunner().invoke(program.app, [str(word) for word in words])


def test_a_run_samples_by_file_and_by_name_converts_scores_and_reports(tmp_path: Path) -> None:
    method = {**LORA, "lora_target_modules": "locon", "lora_dropout": 0}
    tree = tiny.make_recipe(tmp_path, method=method, optimizer__learning_rate=3e-2)
    assert command("train", tiny.write_recipe(tmp_path / "r.yaml", tree)).exit_code == 0
    run, model = tmp_path / "run", tmp_path / "model"
    kohya, theirs = run / "exports" / "run.safetensors", run / "exports" / DIFFUSERS_LORA
    report = (run / "report.html").read_text()
    assert "--lora exports/run.safetensors:0.8" in report and "&lt;lora:run:1&gt;" in report

    def sample(prompt: str, *words: Any) -> Any:
        out = tmp_path / "exported.png"
        options = ["--num-images", 1, "--steps", 2, "--json", "--out", out]
        result = command("sample", "--prompt", prompt, *words, *options)
        assert result.exit_code == 0, result.output
        return np.asarray(Image.open(out)).astype(int)

    def differ(left: Any, right: Any) -> int:
        return int(np.abs(left - right).max())

    plain, tuned = sample("a cat", "--model", model), sample("a cat", "--model", run)
    assert differ(tuned, plain) > 3
    assert differ(sample("a cat", "--model", model, "--lora", kohya), tuned) <= 1
    assert differ(sample("a cat", "--model", model, "--lora", f"{theirs}:1.0"), tuned) <= 1
    assert np.array_equal(sample("a cat", "--model", model, "--lora", f"{kohya}:0"), plain)
    halves = sample("a cat <lora:run:0.5>", "--model", model, "--lora-dir", kohya.parent)
    assert differ(halves, tuned) > 1 and differ(halves, plain) > 1
    twice = sample("a cat <lora:run:0.5>", "--model", model, "--lora", kohya)
    assert differ(twice, halves) <= 1, "a prompt's multiplier counts"
    added = sample("a cat <lora:run:-1>", "--model", run, "--lora-dir", kohya.parent)
    assert differ(added, plain) <= 1, "a run's own LoRA stays when a prompt adds one"
    wrong = command("sample", "--prompt", "<lora:x>", "--lora-dir", kohya.parent, "--model", model)
    assert wrong.exit_code == 2 and "no x.safetensors" in wrong.output
    assert command("sample", "--prompt", "a", "--lora", "gone.safetensors").exit_code == 2

    for source, name in ((kohya, "theirs"), (theirs, "kohyas")):
        assert command("convert", source, tmp_path / f"{name}.safetensors").exit_code == 0
        assert (
            differ(sample("a cat", "--model", model, "--lora", tmp_path / f"{name}.safetensors"), tuned) <= 1
        )
        assert read_lora(tmp_path / f"{name}.safetensors").is_kohyas == (name == "kohyas")
    assert command("convert", kohya, tmp_path / "a.pt").exit_code == 2
    scores = command("score", run, "--num-images", 1, "--json")
    assert scores.exit_code == 0 and json.loads(scores.stdout)["method"] == "dreambooth"
