"""Test memory-saving optimizers: Adafactor, steps in backward, bfloat16 weights with stochastic rounding."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from engine_parts import make_parts, take_step

from dreamfleet.datasets.errors import CheckpointError, RecipeError
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.optimizer import OptimizerConfig
from dreamfleet.trainers.config.optimizers import OPTIMIZERS
from dreamfleet.trainers.engines.torch_engine import TorchEngine
from dreamfleet.trainers.optim.adafactor import Adafactor
from dreamfleet.trainers.optim.optimizers import make_optimizer
from dreamfleet.trainers.optim.param_group import ParamGroup
from dreamfleet.trainers.optim.stochastic_rounding import Stepper, round_stochastically
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts
from dreamfleet.trainers.run.checkpoint import Checkpoints
from dreamfleet.trainers.run.run import run_worker

ALONE = [name for name, kind in OPTIMIZERS.items() if kind.steps_alone and kind.package is None]
NO_CLIPPING: dict[str, Any] = {"learning_rate": 1e-3, "max_grad_norm": 0}
FUSED: dict[str, Any] = {**NO_CLIPPING, "fused_backward": True}
LORA: dict[str, Any] = {"name": "dreambooth", "lora_rank": 4, "train_text_encoder": True}
NARROW: dict[str, Any] = {"train__mixed_precision": "bf16", "train__full_bf16": True}


def step_inside(parts: Parts, step: int) -> tuple[float, float]:
    """Take a step as the loop does, with begin_step before backward; return loss and gradient norm."""
    rates = dict.fromkeys(parts.rates, 1e-3)
    parts.engine.begin_step(rates, step + 1)
    loss = parts.engine.backward(parts.prepare(parts.engine.to_device(parts.feed.batch(step))))
    return float(loss.total), float(parts.engine.step(rates, step + 1))


def test_adafactor_equals_that_of_transformers_on_flat_kernels() -> None:
    from transformers.optimization import Adafactor as Theirs

    torch.manual_seed(0)
    shapes = [(6, 4), (5, 3, 3, 3), (7,)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [
        torch.nn.Parameter(p.detach().clone().flatten(1) if p.dim() > 1 else p.detach().clone()) for p in ours
    ]
    options = {"relative_step": False, "scale_parameter": False, "warmup_init": False}
    optimizers = [
        Adafactor(ours, lr=0.01, weight_decay=0.1),
        Theirs(theirs, lr=0.01, weight_decay=0.1, **options),
    ]
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine) * 3
            other.grad = mine.grad.view_as(other).clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.view_as(other), other, rtol=1e-6, atol=1e-7)
    kept = sum(v.numel() for v in optimizers[0].state[ours[1]].values())
    assert kept == 5 + 27 + 1, "a kernel keeps a mean per row and per column, and its step"


def test_rounding_preserves_the_mean_and_yields_neighbours() -> None:
    value = torch.tensor([1.0 + 2**-9, -3.0 - 2**-9, 0.5, 0.0]).repeat(20000, 1)
    rounded = value.clone()
    round_stochastically(rounded, torch.Generator().manual_seed(3))
    assert torch.equal(rounded.bfloat16().float(), rounded)
    assert torch.equal(rounded[:, 2:].float(), value[:, 2:]), "what bfloat16 can hold stays"
    assert set(rounded[:, 0].float().unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert set(rounded[:, 1].float().unique().tolist()) == {-3.0, -3.0 - 2**-6}
    # The values are 1/4 and 1/8 of the way to a neighbour; tolerances: four standard errors of the mean.
    assert float((rounded[:, 0] != 1.0).float().mean()) == pytest.approx(0.25, abs=0.0125)
    assert float((rounded[:, 1] != -3.0).float().mean()) == pytest.approx(0.125, abs=0.0095)


def test_updates_too_small_for_bfloat16_take_effect_on_average() -> None:
    def train(seed: int) -> torch.Tensor:
        param = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        stepper = Stepper(torch.optim.SGD([param], lr=1e-4), seed=seed)
        for step in range(100):
            param.grad = torch.ones_like(param)
            stepper.step_all(step + 1)
        return param.detach()

    moved = train(seed=1)
    # Rounded to the nearest value, all weights would still be 1.
    assert float(moved.float().mean()) == pytest.approx(0.99, abs=5e-4)
    assert torch.equal(moved, train(seed=1)) and not torch.equal(moved, train(seed=2))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_bfloat16_weights_stepped_together_equal_those_stepped_alone(name: str) -> None:
    """Test that small weights share an optimizer call; each change equals a separate step up to rounding."""
    torch.manual_seed(0)
    values = [torch.randn(shape) for shape in [(40, 50), (7,), (3, 5, 3, 3), (11, 4), (20, 90)]]
    values[2] = values[2].contiguous(memory_format=torch.channels_last)
    gradients = [torch.randn_like(value) for value in values]
    ends, calls = [], []
    for together in (True, False):
        params = [torch.nn.Parameter(value.bfloat16()) for value in values]
        optimizer = make_optimizer(
            [ParamGroup("all", {str(n): p for n, p in enumerate(params)})],
            OptimizerConfig(name=name),
        )
        optimizer.param_groups[0]["lr"] = 0.05
        stepper = Stepper(optimizer, seed=1)
        called = [0]
        optimizer.register_step_pre_hook(lambda *_, called=called: called.__setitem__(0, called[0] + 1))
        for step in (1, 2, 3):
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient.bfloat16()
            if together:
                stepper.step_all(step)
            else:
                for param in params:
                    stepper.step(param, step)
        assert all(param.grad is None for param in params)
        assert len(optimizer.state) == len(params)
        ends.append(params)
        calls.append(called[0])
    assert calls == [6, 15], "the largest alone, then all that fit its size"
    for mine, other, value in zip(*ends, values, strict=True):
        assert mine.stride() == value.stride()
        torch.testing.assert_close(mine.float(), other.float(), rtol=2**-4, atol=1e-3)  # three roundings
        assert not torch.equal(mine.float(), value.bfloat16().float())


@pytest.mark.parametrize("method", [{"name": "dreambooth"}, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("name", ALONE)
def test_a_step_inside_backward_equals_a_step_after_it(
    tmp_path: Path, name: str, method: dict[str, Any]
) -> None:
    plain = make_parts(tmp_path, method=method, optimizer={**NO_CLIPPING, "name": name})
    fused = make_parts(tmp_path, method=method, optimizer={**FUSED, "name": name})
    start = copy.deepcopy(fused.engine.weights())
    fused.engine.backward(fused.prepare(fused.feed.batch(9)))  # the trial step before the first step
    assert all(torch.equal(value, start[key]) for key, value in fused.engine.weights().items())
    for step in range(3):
        (loss, norm), (other, other_norm) = step_inside(fused, step), step_inside(plain, step)
        assert loss == other and norm == pytest.approx(other_norm, rel=1e-5)
        assert all(param.grad is None for param in fused.engine.params.values())
    for key, value in plain.engine.weights().items():
        assert torch.equal(value, fused.engine.weights()[key]), key
    with pytest.raises(RuntimeError, match="begin_step"):
        fused.engine.step(dict.fromkeys(fused.rates, 1e-3), 4)


def test_gradients_are_freed_inside_backward(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, optimizer=FUSED)
    params, alive = list(parts.engine.params.values()), []
    # This hook runs after the engine's own hook, which has taken the step and freed the gradient.
    for param in params:
        param.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(other.grad is not None for other in params))
        )
    step_inside(parts, 0)
    assert len(alive) == len(params) and max(alive) == 0


@pytest.mark.parametrize("before", [False, True], ids=["to channels last", "from channels last"])
def test_loaded_moments_have_the_layout_of_their_weights(tmp_path: Path, before: bool) -> None:
    """Test a change of channels_last on resume: fused kernels pair weights and moments by memory position."""
    straight, saved = make_parts(tmp_path), make_parts(tmp_path, engine={"channels_last": before})
    for step in range(2):
        take_step(straight, step)
        take_step(saved, step)
    resumed = make_parts(tmp_path, engine={"channels_last": not before, "use_ema": True})
    resumed.engine.load_weights(saved.engine.weights())
    resumed.engine.load_state({**saved.engine.state(), "ema": saved.engine.weights()})
    for step in range(2, 5):
        take_step(straight, step)
        take_step(resumed, step)
    for name, value in straight.engine.weights().items():
        # A wrong pairing would differ by about 1e-3.
        torch.testing.assert_close(resumed.engine.weights()[name], value, rtol=0, atol=3e-4)
    engine = resumed.engine
    assert isinstance(engine, TorchEngine) and engine.ema is not None
    for name, param in engine.params.items():
        kept = [*engine.optimizer.state[param].values(), engine.ema.shadow[name]]
        assert {t.stride() for t in kept if t.shape == param.shape} == {param.stride()}


def test_a_closed_engine_removes_its_hooks(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, optimizer=FUSED)
    engine, param = weakref.ref(parts.engine), next(iter(parts.engine.params.values()))
    parts.engine.close()
    del parts
    gc.collect()
    assert engine() is None and not param._post_accumulate_grad_hooks  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_bfloat16_weights_train_and_resume_exactly(tmp_path: Path, name: str) -> None:
    """Test complete runs: near the float32 curve, bit-identical resume, saved and exported in bfloat16."""
    changes = {
        "optimizer": {**FUSED, "name": name, "learning_rate": 2e-4},
        "train__max_train_steps": 6,
        **NARROW,
    }
    whole = {**changes, "train__full_bf16": False, "output_dir": str(tmp_path / "wide")}
    run_worker(build_recipe(tiny.make_recipe(tmp_path, **whole)))
    recipe = tiny.make_recipe(tmp_path, **changes, output_dir=str(tmp_path / "straight"))
    run_worker(build_recipe(recipe))
    recipe["output_dir"] = str(tmp_path / "stopped")
    stop = iter([False] * 3)
    run_worker(build_recipe(recipe), should_stop=lambda: next(stop, True))
    assert run_worker(build_recipe(recipe), resume=True).start_step in (2, 3, 4)
    ends = [Checkpoints(Storage(tmp_path / run)).load(6).learned for run in ("straight", "stopped")]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    assert {value.dtype for value in ends[0].values()} == {torch.bfloat16}
    states = Checkpoints(Storage(tmp_path / "stopped")).load(6).engine["optimizer"]["state"]
    assert {value.dtype for state in states.values() for value in state.values()} == {torch.float32}
    exported = safetensors.torch.load_file(tmp_path / "straight/exports/straight.safetensors")
    key = "model.diffusion_model.out.2.weight"
    assert torch.equal(exported[key], ends[0]["unet.conv_out.weight"].float())
    curves = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("straight", "wide")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=0.05)


def test_a_lora_in_bfloat16_trains_and_resumes_exactly(tmp_path: Path) -> None:
    recipe = tiny.make_recipe(tmp_path, method=LORA, optimizer=FUSED, train__max_train_steps=6, **NARROW)
    ends = []
    for run, stop in (("straight", iter(())), ("stopped", iter([False] * 3))):
        recipe["output_dir"] = str(tmp_path / run)
        last = run == "stopped"
        run_worker(build_recipe(recipe), should_stop=lambda stop=stop, last=last: next(stop, last))
    assert run_worker(build_recipe(recipe), resume=True).start_step in (2, 3, 4)
    for run in ("straight", "stopped"):
        ends.append(Checkpoints(Storage(tmp_path / run)).load(6).learned)
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    assert {value.dtype for value in ends[0].values()} == {torch.bfloat16}
    assert any(value.abs().max() > 1e-3 for key, value in ends[0].items() if "lora_B" in key), (
        "nothing was learned"
    )


def test_the_average_of_bfloat16_weights_is_exported_in_float32(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, optimizer=NO_CLIPPING, engine={"use_ema": True, "ema_decay": 0.9}, **NARROW)
    take_step(parts)
    engine, (name, param) = parts.engine, next(iter(parts.engine.params.items()))
    assert isinstance(engine, TorchEngine) and engine.ema is not None
    live = param.detach().clone()
    assert engine.evaluate(lambda: param.dtype) == torch.bfloat16
    with engine.full_weights():
        assert torch.equal(param, engine.ema.shadow[name]) and param.dtype == torch.float32
    assert torch.equal(param, live) and param.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"fused_backward_pass": True}}, "set max_grad_norm: 0"),
        ({"optimizer": FUSED, "train__gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 2"),
        ({"optimizer": FUSED, "scaling__num_workers": 2}, "scaling.num_workers: 2"),
        ({"optimizer": FUSED, "engine__zero_stage": 2}, "engine.zero_stage: 2"),
        ({"optimizer": FUSED, "train__mixed_precision": "fp16"}, "back"),
        ({"train__full_bf16": True}, "mixed_precision: bf16"),
        ({**NARROW, "engine__zero_stage": 2}, "full_bf16: .*engine.zero_stage"),
        ({"optimizer": {"name": "adafactor"}, "engine__zero_stage": 1}, "adafactor"),
    ],
)
def test_conflicting_settings_are_errors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipe(tiny.make_recipe(tmp_path, **changes))


def test_a_checkpoint_of_another_optimizer_is_rejected(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, optimizer={**NO_CLIPPING, "name": "adafactor"})
    take_step(parts)
    with pytest.raises(CheckpointError, match=r"optimizer\.name: adafactor"):
        make_parts(tmp_path).engine.load_state(parts.engine.state())
