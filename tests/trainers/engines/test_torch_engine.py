"""Test TorchEngine: accumulation, gradient checkpointing, EMA, clipping, learning rates, performance."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engine_parts import make_parts, take_step
from transformers.models.clip.modeling_clip import CLIPAttention

from dreamfleet.datasets.errors import CheckpointError, RecipeError, ResourceError
from dreamfleet.trainers.batches.feed import Preparer
from dreamfleet.trainers.evaluation.eval_mode import eval_mode
from dreamfleet.trainers.methods.export_request import Export
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts
from dreamfleet.trainers.run.run import run_worker


def test_two_accumulated_micro_batches_equal_one_batch_of_twice_the_size(tmp_path: Path) -> None:
    whole = make_parts(tmp_path, train__train_batch_size=4)
    parts = make_parts(tmp_path, train__train_batch_size=2, train__gradient_accumulation_steps=2)
    assert whole.global_batch == parts.global_batch == 4
    for step in range(3):
        assert take_step(parts, step) == pytest.approx(take_step(whole, step), rel=1e-4)
    for name, tensor in whole.method.state().items():
        assert torch.allclose(tensor, parts.method.state()[name], atol=2e-4), name


@pytest.mark.parametrize("text", [False, True])
def test_gradient_checkpointing_does_not_change_results(tmp_path: Path, text: bool) -> None:
    method = {"name": "dreambooth", "train_text_encoder": text}
    plain = make_parts(tmp_path, method=method)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        saving = make_parts(tmp_path, method=method, train__gradient_checkpointing=True)
    assert not [str(warning.message) for warning in warned if "checkpointing" in str(warning.message)]
    assert saving.model.unet.is_gradient_checkpointing and not plain.model.unet.is_gradient_checkpointing
    assert [part.is_gradient_checkpointing for part in saving.model.text_encoders] == [text]
    for step in range(2):
        assert take_step(saving, step) == pytest.approx(take_step(plain, step), rel=1e-6)


def test_gradient_checkpointing_works_with_a_frozen_unet(tmp_path: Path) -> None:
    method = {"name": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "cat"}
    plain = make_parts(tmp_path, method=method)
    saving = make_parts(tmp_path, method=method, train__gradient_checkpointing=True)
    for step in range(2):
        assert take_step(saving, step, 0.1) == pytest.approx(take_step(plain, step, 0.1), rel=1e-6)


WORD_METHODS = [
    {"name": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "cat"},
    {"name": "prompt_tuning", "placeholder_token": "<x>", "initializer_token": "cat"},
    {"name": "dreambooth", "train_text_encoder": True},
    {"name": "native", "train_text_encoder": True, "lora_rank": 2},
]


def layer_calls(parts: Parts, step: int) -> int:
    """Take a step; return the number of calls of the text encoder's attention modules."""
    calls: list[int] = []
    inside = [module for module in parts.model.text_encoder.modules() if isinstance(module, CLIPAttention)]
    hooks = [module.register_forward_pre_hook(lambda *_: calls.append(1)) for module in inside]
    take_step(parts, step)
    for hook in hooks:
        hook.remove()
    return len(calls)


@pytest.mark.parametrize("method", WORD_METHODS, ids=lambda method: method["name"])
def test_gradient_checkpointing_computes_every_layer_of_the_text_encoder_twice(
    tmp_path: Path, method: dict[str, Any]
) -> None:
    """Test the number of calls per step, also after a validation; a frozen encoder applies no dropout."""
    plain = make_parts(tmp_path, method=method)
    saving = make_parts(tmp_path, method=method, train__gradient_checkpointing=True)
    for parts in (plain, saving):
        for module in parts.model.text_encoder.modules():
            if isinstance(module, CLIPAttention) and not module.training:
                module.dropout = 0.5  # as in a config's attention_dropout; a frozen encoder must not apply it
    for step in range(2):
        once = layer_calls(plain, step)
        assert once > 0 and layer_calls(saving, step) == 2 * once
        with eval_mode(saving.method):
            assert not any(module.training for module in saving.model.text_encoder.modules())
    for name, tensor in plain.method.state().items():
        assert torch.allclose(tensor, saving.method.state()[name], atol=1e-5), name


def test_bf16_is_near_the_float32_curve_and_keeps_float32_weights(tmp_path: Path) -> None:
    half, full = make_parts(tmp_path, train__mixed_precision="bf16"), make_parts(tmp_path)
    for step in range(3):
        assert take_step(half, step) == pytest.approx(take_step(full, step), rel=0.05)
    assert all(param.dtype == torch.float32 for param in half.engine.params.values())


def test_the_average_follows_the_weights_and_replaces_them_for_evaluation(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, engine={"use_ema": True, "ema_decay": 0.9})
    name = next(iter(parts.engine.params))
    expected = parts.engine.params[name].detach().clone()
    for step in range(3):
        take_step(parts, step)
        decay = min(0.9, (2 + step) / (11 + step))
        expected = decay * expected + (1 - decay) * parts.engine.params[name].detach()
    live = parts.engine.params[name].detach().clone()
    assert torch.allclose(parts.engine.ema.shadow[name], expected, atol=1e-6)
    assert parts.engine.evaluate(
        lambda: torch.equal(parts.engine.params[name], parts.engine.ema.shadow[name])
    )
    assert torch.equal(parts.engine.params[name], live)


def test_clipping_limits_the_step_and_zero_disables_it(tmp_path: Path) -> None:
    for limit in (1e-3, 0.0):
        parts = make_parts(tmp_path, optimizer__max_grad_norm=limit)
        parts.engine.backward(parts.prepare(parts.feed.batch(0)))
        raw = torch.cat([p.grad.flatten() for p in parts.engine.params.values() if p.grad is not None]).norm()
        seen = {}
        parts.engine.optimizer.step = lambda seen=seen, parts=parts: seen.update(  # type: ignore[method-assign]
            norm=torch.cat(
                [p.grad.flatten() for p in parts.engine.params.values() if p.grad is not None]
            ).norm()
        )
        reported = parts.engine.step(dict.fromkeys(parts.rates, 0.0), 1)
        assert reported == pytest.approx(float(raw), rel=1e-4)
        assert seen["norm"] == pytest.approx(limit or float(raw), rel=1e-3)


def test_learning_rates_are_per_group_and_scaled_on_request(tmp_path: Path) -> None:
    parts = make_parts(
        tmp_path,
        method={"name": "dreambooth", "train_text_encoder": True},
        optimizer={
            "learning_rate": 1e-3,
            "text_encoder_lr": "1e-4:2,1e-5",
            "lr_warmup_steps": 2,
            "lr_scheduler": "linear",
        },
        train__max_train_steps=10,
    )
    assert [parts.rates["unet"](step) for step in (0, 1, 2, 6)] == pytest.approx([0, 5e-4, 1e-3, 5e-4])
    assert [parts.rates["text_encoder"](step) for step in (0, 1, 2)] == [1e-4, 1e-4, 1e-5]
    scaled = make_parts(
        tmp_path, optimizer={"learning_rate": 1e-3, "scale_lr": True}, train__train_batch_size=3
    )
    assert scaled.rates["unet"](0) == pytest.approx(3e-3)
    with pytest.raises(RecipeError, match="scale_lr"):
        make_parts(tmp_path, optimizer={"learning_rate": "1e-3:5,1e-4", "scale_lr": True})


def test_the_end_of_a_schedule_string_ends_the_training(tmp_path: Path) -> None:
    tree = tiny.make_recipe(tmp_path, optimizer__learning_rate="1e-3:2,1e-4:3", train__max_train_steps=50)
    summary = run_worker(build_recipe(tree))
    assert summary.steps == 3 and summary.exit_reason == "completed"
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["lr"]["unet"] for line in lines] == [1e-3, 1e-3, 1e-4]


def test_missing_hardware_is_an_error(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ResourceError, match="fp16 needs a GPU"):
        make_parts(tmp_path, train__mixed_precision="fp16")
    with pytest.raises(ResourceError, match="adamw8bit needs a GPU"):
        make_parts(tmp_path, optimizer__name="adamw8bit")


def test_an_optimizer_or_average_that_does_not_match_is_an_error(tmp_path: Path) -> None:
    small = make_parts(tmp_path)
    large = make_parts(tmp_path, method={"name": "dreambooth", "train_text_encoder": True})
    take_step(small)
    with pytest.raises(CheckpointError, match="does not fit"):
        large.engine.load_state(small.engine.state())
    averaging = make_parts(tmp_path, engine={"use_ema": True})
    with pytest.raises(CheckpointError, match="without an average"):
        averaging.engine.load_state(small.engine.state())


def test_a_missing_length_and_wrong_resolutions_are_errors(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="max_train_steps"):
        make_parts(tmp_path, train__max_train_steps=None)
    assert make_parts(tmp_path, train__max_train_steps=None, train__num_train_epochs=2).schedule.total == 6
    with pytest.raises(RecipeError, match="multiple of 8"):
        make_parts(tmp_path, data__resolution=36)


# Torch raises this warning while it inspects the inputs of a block.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [{"channels_last": True}, {"torch_compile": True, "dynamo_backend": "aot_eager"}]
)
def test_performance_options_change_neither_results_nor_names(tmp_path: Path, engine: dict[str, Any]) -> None:
    plain, fast = make_parts(tmp_path), make_parts(tmp_path, engine=engine)
    block = next(m for m in fast.model.unet.modules() if type(m).__name__ == "ResnetBlock2D")
    if "channels_last" in engine:
        assert block.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        assert not block.conv1.weight.is_contiguous()
    else:
        assert block._compiled_call_impl is not None
    for step in range(2):
        assert take_step(fast, step) == pytest.approx(take_step(plain, step), rel=1e-5)
    ours, theirs = fast.engine.weights(), plain.engine.weights()
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(value, ours[name], atol=2e-4) for name, value in theirs.items())
    with fast.engine.full_weights():
        assert all(param.is_contiguous() for param in fast.engine.params.values())
        paths = fast.method.export(Export(tmp_path, "fast", step=2, metadata={}, precision="fp32"))
    from safetensors.torch import load_file

    name = "down_blocks.0.resnets.0.conv1.weight"
    written = load_file(next(paths[0].rglob("unet/*.safetensors")))
    assert torch.equal(written[name], ours[f"unet.{name}"])
    assert set(written) == set(plain.model.unet.state_dict())


def test_performance_options_that_zero_does_not_support_are_errors(tmp_path: Path) -> None:
    for engine, message in (
        ({"channels_last": True, "zero_stage": 2}, "channels_last"),
        ({"torch_compile": True, "zero_stage": 3}, "torch_compile"),
    ):
        with pytest.raises(RecipeError, match=message):
            make_parts(tmp_path, engine=engine)


def test_trained_parts_can_stay_on_the_host(tmp_path: Path) -> None:
    model = make_parts(tmp_path).model
    model.to("meta", torch.bfloat16, home="cpu")
    kept = {name: (next(p.parameters()).device.type, p.dtype) for name, p in model.modules().items()}
    assert kept["unet"] == ("cpu", torch.float32)
    assert kept["text_encoder"] == ("meta", torch.bfloat16)
    assert kept["vae"] == ("meta", torch.float32), "latents do not depend on what a run computes in"


def test_encoded_prompts_are_cached_up_to_a_limit(tmp_path: Path) -> None:
    parts, asked = make_parts(tmp_path), []
    read = parts.model.encode
    parts.model.encode = lambda prompts: asked.append(list(prompts)) or read(prompts)  # type: ignore[method-assign,func-returns-value]
    one = read(["a cat"]).num_bytes
    prepare, batch = Preparer(parts.method, memory=2 * one), parts.feed.batch(0)

    def context(*prompts: str) -> torch.Tensor:
        return prepare({**batch, "prompts": list(prompts)})["context"]

    first = context("a", "b")
    assert torch.equal(first, read(["a", "b"]).context) and asked == [["a", "b"]]
    assert torch.equal(context("b", "a", "b"), first[[1, 0, 1]]) and len(asked) == 1
    context("a", "c")  # evicts b, the least recently used
    context("c", "a")
    assert asked == [["a", "b"], ["c"]]
    context("b")
    assert asked[2:] == [["b"]]
    assert torch.equal(context("d", "e", "f"), read(["d", "e", "f"]).context), (
        "a batch may need more than is kept"
    )
