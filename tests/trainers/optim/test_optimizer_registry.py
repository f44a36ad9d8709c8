"""Tests of every registered optimizer: a new one is tested by being registered."""

from __future__ import annotations

import copy
import importlib.util
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_parts import make_parts

from dreamfleet.datasets.errors import CheckpointError, RecipeError
from dreamfleet.trainers.config.optimizer import OptimizerConfig
from dreamfleet.trainers.config.optimizers import OPTIMIZERS, Optimizer, state_bytes
from dreamfleet.trainers.engines.torch_engine import TorchEngine
from dreamfleet.trainers.optim.optimizers import make_optimizer, resolve
from dreamfleet.trainers.optim.param_group import ParamGroup
from dreamfleet.trainers.optim.stochastic_rounding import Stepper
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import Parts, make_engine

METHOD = {"name": "dreambooth", "train_text_encoder": True}
NARROW: dict[str, Any] = {"train__mixed_precision": "bf16", "train__full_bf16": True}
SHAPES = [(300, 40), (64, 32, 3, 3), (50,), (5000,)]


def is_installed(kind: Optimizer) -> bool:
    return kind.package is None or importlib.util.find_spec(kind.package) is not None


NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(not is_installed(kind), reason=f"{kind.package} is an extra"))
    for name, kind in OPTIMIZERS.items()
]
pytestmark = pytest.mark.filterwarnings(
    "ignore:Paged optimizers are not supported on CPU", "ignore::DeprecationWarning:bitsandbytes"
)


def finds_rate(name: str) -> bool:
    """Return whether an optimizer finds its own learning rate, given 1."""
    return name.startswith("prodigy")


def section(name: str, rate: float = 1e-3) -> dict[str, Any]:
    rate = 1.0 if finds_rate(name) else rate
    return {"name": name, "learning_rate": rate, "text_encoder_lr": rate / 2, "adam_weight_decay": 0.02}


def make_parts_with(folder: Path, name: str, **changes: Any) -> Parts:
    """Build a run, also with an optimizer for GPUs: bitsandbytes computes on CPUs as well, without paging."""
    optimizer = section(name)
    parts = make_parts(folder, optimizer={**optimizer, "name": "adamw"}, **changes)
    config = OptimizerConfig.model_validate(optimizer)
    parts.engine.close()
    parts.recipe = parts.recipe.model_copy(update={"optimizer": config})
    parts.engine = make_engine(parts.recipe, parts.method, parts.distributed)
    return parts


def take_steps(parts: Parts, start: int, end: int) -> None:
    """Train as the loop does, with an evaluation after every step."""
    engine = parts.engine
    for step in range(start, end):
        rates = {name: rate(step) for name, rate in parts.rates.items()}
        engine.begin_step(rates, step + 1)
        engine.backward(parts.prepare(engine.to_device(parts.feed.batch(step))))
        engine.step(rates, step + 1)
        engine.evaluate(lambda: None)


def everything(parts: Parts) -> dict[str, Any]:
    return {"weights": parts.engine.weights(), "state": parts.engine.state()}


def saved_and_read(state: Any) -> Any:
    """Return a state as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{name}/{key}")
    else:
        yield name, value


def differing(left: Any, right: Any) -> list[str]:
    """Return the names of values that are not equal in every bit and of equal type."""
    ours, theirs = dict(leaves(left)), dict(leaves(right))
    assert ours.keys() == theirs.keys()

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, torch.Tensor):
            return one.dtype == other.dtype and torch.equal(one, other)
        return bool(one == other)

    return [name for name, value in ours.items() if not same(value, theirs[name])]


def as_groups(params: list[torch.nn.Parameter], *, parts: int = 1) -> list[ParamGroup]:
    return [
        ParamGroup(f"part{part}", {str(n): p for n, p in enumerate(params) if n % parts == part})
        for part in range(parts)
    ]


def set_rates(optimizer: torch.optim.Optimizer, *rates: float) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_resume_is_bit_exact(tmp_path: Path, name: str, precision: str) -> None:
    """Test weights, states, the estimated rates and EMA weights after a resume, with a rate for each part."""
    changes: dict[str, Any] = {"method": METHOD, "engine": {"use_ema": True, "ema_decay": 0.9}}
    changes |= NARROW if precision == "bfloat16" else {}
    straight, stopped, resumed = (make_parts_with(tmp_path, name, **changes) for _ in range(3))
    start = copy.deepcopy(straight.engine.weights())
    take_steps(straight, 0, 5)
    take_steps(stopped, 0, 3)
    found = saved_and_read(everything(stopped))
    resumed.engine.load_weights(found["weights"])
    resumed.engine.load_state(found["state"])
    take_steps(resumed, 3, 5)
    assert not differing(everything(resumed), everything(straight))
    assert resumed.engine.effective_rates() == straight.engine.effective_rates()
    end = straight.engine.weights()
    moved = {key.partition(".")[0] for key, value in end.items() if not torch.equal(value, start[key])}
    assert moved == {"unet", "text_encoder"}
    assert {value.dtype for value in end.values()} == {getattr(torch, precision)}


@pytest.mark.parametrize("name", NAMES)
def test_a_quadratic_is_minimised(name: str) -> None:
    """Test that steps lead to the minimum of sum((x - 1)^2), each in the direction of the descent."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    config = OptimizerConfig(name=name, adam_weight_decay=0)
    optimizer = make_optimizer(as_groups(params), config)
    average = resolve(config.kind.average) if config.kind.average else None

    def distance() -> float:
        shown = params if average is None else average(optimizer).values()
        return float(torch.cat([(value.detach() - 1).square().flatten() for value in shown]).mean())

    before = distance()
    for step in range(300):
        set_rates(optimizer, 1.0 if finds_rate(name) else 0.03 * min(1.0, 3 * (1 - step / 300)))
        for param in params:
            param.grad = 2 * (param.detach() - 1)
        optimizer.step()
    assert distance() < before / 10


@pytest.mark.parametrize("name", NAMES)
def test_state_bytes_are_counted(name: str) -> None:
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    config = OptimizerConfig(name=name)
    optimizer = make_optimizer(as_groups(params), config)
    set_rates(optimizer, 1e-3)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    # The tables of 8-bit states are the same tensors for all weights.
    tensors = {id(v): v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)}
    held = sum(tensor.nbytes for tensor in tensors.values())
    counted = state_bytes(SHAPES, name, config.own_options())
    assert counted == pytest.approx(held, rel=0.002, abs=2100 if "8bit" in name else 4)


@pytest.mark.parametrize("name", NAMES)
def test_every_part_has_its_own_rate(name: str) -> None:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(40, 30)) for _ in range(4)]
    start = [param.detach().clone() for param in params]
    config = OptimizerConfig(name=name, learning_rate=1.0, options={})
    groups = as_groups(params, parts=2)
    groups[1] = groups[1]._replace(scale=0.5)  # another rate than that of the first
    optimizer = make_optimizer(groups, config)
    set_rates(optimizer, 1e-2, 0.0)
    for _ in range(5):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    assert [torch.equal(p.detach(), s) for p, s in zip(params, start, strict=True)] == [False, True] * 2
    set_rates(optimizer, 0.0, 5e-3)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert not torch.equal(params[1].detach(), start[1])


@pytest.mark.parametrize("name", NAMES)
def test_updates_too_small_for_bfloat16_take_effect(name: str) -> None:
    """Test that stochastic rounding moves bfloat16 weights as far as float32 weights, on average."""

    def train(dtype: torch.dtype) -> float:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.ones(64, 128, dtype=dtype)) for _ in range(2)]
        options = {"d0": 1e-4} if finds_rate(name) else {}
        config = OptimizerConfig(name=name, adam_weight_decay=0, learning_rate=1.0, options=options)
        optimizer = make_optimizer(as_groups(params), config)
        stepper = Stepper(optimizer, seed=1, steps_alone=config.kind.steps_alone)
        set_rates(optimizer, 1.0 if finds_rate(name) else 1e-4)
        for step in range(40):
            for param in params:
                param.grad = param.detach() - 0.99
            stepper.step_all(step + 1)
        average = resolve(config.kind.average) if config.kind.average else None
        shown = params if average is None else list(average(optimizer).values())
        return 1 - float(torch.stack([value.detach().float().mean() for value in shown]).mean())

    wide, narrow = train(torch.float32), train(torch.bfloat16)
    assert wide > 1e-3 and 0.6 * wide < narrow < 1.5 * wide


@pytest.mark.parametrize("name", NAMES)
def test_states_of_other_optimizers_are_refused(tmp_path: Path, name: str) -> None:
    if name == "adamw":
        pytest.skip("the optimizer that the others are compared with")
    other = make_parts(tmp_path)
    take_steps(other, 0, 1)
    with pytest.raises(CheckpointError, match=r"optimizer\.name: adamw"):
        make_parts_with(tmp_path, name).engine.load_state(other.engine.state())


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_unsupported_engines_are_refused_with_a_remedy(name: str) -> None:
    kind = OPTIMIZERS.get(name)

    def errors(**changes: Any) -> str:
        tree: dict[str, Any] = {
            "method": {"name": "dreambooth"},
            "model": {"pretrained_model_name_or_path": "pocket"},
            "data": {"instance_data_dir": "x", "instance_prompt": "a sks cat"},
            "train": {"max_train_steps": 1},
            "output_dir": "runs/x",
        }
        optimizer = {"name": name, **changes.pop("optimizer", {})}
        try:
            build_recipe({**tree, "optimizer": optimizer, **changes})
        except RecipeError as error:
            return str(error)
        return ""

    for stage in range(4):
        found = errors(engine={"zero_stage": stage})
        assert not found if kind.moments else f"{name} does not go with engine.zero_stage: {stage}" in found
        assert kind.moments or "engine.zero_stage: auto" in found
    offload = {"zero_stage": 2, "offload_optimizer_device": "cpu"}
    assert bool(errors(engine=offload)) is not kind.offloads
    normed = errors(method={"name": "dreambooth", "lora_rank": 4, "scale_weight_norms": 1.0})
    assert bool(normed) is (kind.average is not None)
    fused = errors(optimizer={"fused_backward": True, "max_grad_norm": 0})
    assert not fused if kind.steps_alone else "fused_backward: false" in fused


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if kind.average is not None])
@pytest.mark.parametrize("ema", [False, True], ids=["its average", "and EMA"])
def test_the_average_is_evaluated_exported_and_saved(tmp_path: Path, name: str, ema: bool) -> None:
    engine = {"use_ema": True, "ema_decay": 0.5} if ema else {}
    parts = make_parts_with(tmp_path, name, engine=engine)
    assert isinstance(parts.engine, TorchEngine)
    take_steps(parts, 0, 4)
    trained = copy.deepcopy(parts.engine.weights())
    shown = parts.engine.evaluate(lambda: copy.deepcopy(parts.method.state()))
    with parts.engine.full_weights():
        exported = copy.deepcopy(parts.method.state())
    assert not differing(parts.engine.weights(), trained), "the trained weights are untouched"
    assert differing(shown, trained) and not differing(shown, exported)
    saved = parts.engine.state()["ema"]
    assert all(torch.equal(saved[key], value) for key, value in shown.items())
    average = parts.engine._averages()
    if ema:  # follows the optimizer's average, not the trained weights
        errors = [
            sum(float((saved[key] - other[key]).square().sum()) for key in saved)
            for other in (average, trained)
        ]
        assert 0 < errors[0] < errors[1]
    else:
        assert not differing(dict(saved), average)


def test_the_average_is_that_of_the_package() -> None:
    torch.manual_seed(0)
    for name in ("adamw_schedulefree", "prodigy_schedulefree"):
        params = [torch.nn.Parameter(torch.randn(40, 8)) for _ in range(3)]
        config = OptimizerConfig(name=name)
        optimizer: Any = make_optimizer(as_groups(params), config)
        set_rates(optimizer, 0.1)
        for _ in range(4):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
        assert config.kind.average is not None
        ours = list(resolve(config.kind.average)(optimizer).values())
        optimizer.eval()
        for mine, theirs in zip(ours, params, strict=True):
            torch.testing.assert_close(mine, theirs.detach(), rtol=1e-6, atol=1e-7)


def test_prodigy_shares_its_estimate_unless_rates_differ() -> None:
    params = [torch.nn.Parameter(torch.randn(30, 20)) for _ in range(2)]
    for scale, options, number in ((1.0, {}, 1), (0.5, {}, 2), (1.0, {"split_groups": True}, 2)):
        groups = as_groups(params, parts=2)
        groups[1] = groups[1]._replace(scale=scale)
        optimizer = make_optimizer(
            groups, OptimizerConfig(name="prodigy", learning_rate=1.0, options=options)
        )
        set_rates(optimizer, 1.0, scale)
        for step in range(6):
            for part, param in enumerate(params):
                param.grad = param.detach() * (1 + 3 * part) / (1 + step)
            optimizer.step()
        assert len({group["d"] for group in optimizer.param_groups}) == number
        assert all(group["d"] > 1e-6 for group in optimizer.param_groups)


def test_lion_equals_its_formula() -> None:
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(7, 5))
    optimizer = make_optimizer(
        [ParamGroup("all", {"p": param})], OptimizerConfig(name="lion", adam_weight_decay=0.1)
    )
    set_rates(optimizer, 0.01)
    expected, momentum = param.detach().double(), torch.zeros(7, 5, dtype=torch.float64)
    for _ in range(5):
        param.grad = torch.randn(7, 5)
        gradient = param.grad.double()
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * (0.9 * momentum + 0.1 * gradient).sign()
        momentum = 0.99 * momentum + 0.01 * gradient
        optimizer.step()
    torch.testing.assert_close(param.detach().double(), expected, rtol=1e-6, atol=1e-7)


def test_came_equals_its_formula() -> None:
    """Test algorithm 2 of Luo et al. 2023 in float64, for a kernel (as a matrix) and a vector."""
    torch.manual_seed(0)
    shapes = [(6, 2, 3, 3), (9,)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = make_optimizer(as_groups(params), OptimizerConfig(name="came", adam_weight_decay=0.1))
    set_rates(optimizer, 0.01)
    expected = [param.detach().double() for param in params]
    states: list[dict[str, Any]] = [{"m": 0.0, "r": 0.0, "c": 0.0, "R": 0.0, "C": 0.0} for _ in params]

    def inverse_root(rows: Any, columns: Any) -> Any:
        return (torch.outer(rows, columns) / rows.mean()).rsqrt()

    for _ in range(4):
        for number, param in enumerate(params):
            param.grad = torch.randn_like(param) * 3
            gradient, state = param.grad.double(), states[number]
            squares = gradient.flatten(1).square() if number == 0 else gradient.square()
            if number == 0:
                gradient = gradient.flatten(1)
                state["r"] = 0.999 * state["r"] + 0.001 * squares.mean(1)
                state["c"] = 0.999 * state["c"] + 0.001 * squares.mean(0)
                update = gradient * inverse_root(state["r"], state["c"])
            else:
                state["r"] = 0.999 * state["r"] + 0.001 * squares
                update = gradient * state["r"].rsqrt()
            update = update / max(1.0, float(update.norm()) / math.sqrt(update.numel()))
            state["m"] = 0.9 * state["m"] + 0.1 * update
            change = state["m"]
            if number == 0:
                deviation = (update - state["m"]).square() + 1e-16
                state["R"] = 0.9999 * state["R"] + 0.0001 * deviation.mean(1)
                state["C"] = 0.9999 * state["C"] + 0.0001 * deviation.mean(0)
                change = state["m"] * inverse_root(state["R"], state["C"])
            expected[number] = expected[number] * (1 - 0.001) - 0.01 * change.view(shapes[number])
        optimizer.step()
    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach().double(), value, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("AdamW", "adamw"),
        ("AdamW8bit", "adamw8bit"),
        ("PagedAdamW8bit", "paged_adamw8bit"),
        ("PagedAdamW32bit", "paged_adamw"),
        ("LION_8BIT", "lion8bit"),
        ("Prodigy", "prodigy"),
        ("prodigyopt.Prodigy", "prodigy"),
        ("prodigyplus.ProdigyPlusScheduleFree", "prodigy_schedulefree"),
        ("PRODIGY_PLUS_SCHEDULE_FREE", "prodigy_schedulefree"),
        ("AdamWScheduleFree", "adamw_schedulefree"),
        ("SCHEDULE_FREE_ADAMW", "adamw_schedulefree"),
        ("pytorch_optimizer.CAME", "came"),
    ],
)
def test_names_of_other_programs_are_accepted(text: str, name: str) -> None:
    assert OptimizerConfig.model_validate({"optimizer_type": text}).name == name


def test_kohyas_arguments_become_options() -> None:
    arguments = ["betas=0.8,0.99", "decouple=True", "d_coef=2", "growth_rate=1.02"]
    listed = OptimizerConfig.model_validate({"optimizer_type": "Prodigy", "optimizer_args": arguments})
    text = OptimizerConfig.model_validate({"name": "prodigy", "optimizer_args": " ".join(arguments)})
    assert listed == text
    options: Any = listed.own_options()
    assert options.betas == (0.8, 0.99) and options.d_coef == 2.0 and options.growth_rate == 1.02
    assert options.weight_decay == 1e-2 and options.eps == 1e-8, "from the keys adam_*"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "prodgy"}, r"optimizer\.name: .*did you mean 'prodigy'"),
        ({"name": "prodigy", "options": {"d_coeff": 2}}, r"optimizer\.options\.d_coeff: .*d_coef"),
        ({"name": "prodigy", "options": {"d_coef": 0}}, r"optimizer\.options\.d_coef: .*greater than 0"),
        (
            {"name": "adafactor", "optimizer_args": ["relative_step=True"]},
            r"options\.relative_step: .*[Ff]alse",
        ),
        ({"name": "lion", "optimizer_args": ["betas"]}, "key=value"),
        ({"name": "lion", "options": {"betas": [0.9, 1.5]}}, r"optimizer\.options\.betas"),
    ],
)
def test_wrong_settings_are_recipe_errors(changes: dict[str, Any], message: str) -> None:
    tree = {
        "method": {"name": "dreambooth"},
        "model": {"pretrained_model_name_or_path": "pocket"},
        "data": {"instance_data_dir": "x", "instance_prompt": "a sks cat"},
        "train": {"max_train_steps": 1},
        "output_dir": "runs/x",
    }
    with pytest.raises(RecipeError, match=message):
        build_recipe({**tree, "optimizer": changes})
