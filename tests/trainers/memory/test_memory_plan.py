"""Test the memory plan: estimates equal the memory of a run and the figures of the ZeRO paper."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from engine_parts import make_parts, take_step
from memory_plans import count, trace_real_step
from model_configs import SD15, write_configs
from torch import Tensor
from typer.testing import CliRunner

from dreamfleet.cluster.cli import program
from dreamfleet.datasets.errors import ResourceError
from dreamfleet.trainers.batches.feed import REMEMBERED
from dreamfleet.trainers.config.units import parse_size
from dreamfleet.trainers.engines.torch_engine import TorchEngine
from dreamfleet.trainers.memory.estimate import GIB, cheapest_fit, estimate, estimate_all
from dreamfleet.trainers.memory.inputs import Counts, Pass
from dreamfleet.trainers.memory.strategies import CHOICES, EngineChoice
from dreamfleet.trainers.memory.trace import precision
from dreamfleet.trainers.run.build import Parts

PLAIN = CHOICES[0]
WORD = {"name": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "cat", "num_vectors": 3}
DREAMBOOTH: dict[str, Any] = {"name": "dreambooth", "train_text_encoder": True}


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_configs(tmp_path_factory.mktemp("sd15"))


def sizes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


SMALL = {"name": "adafactor", "fused_backward": True, "max_grad_norm": 0}


def test_estimates_equal_the_memory_of_a_bfloat16_run_with_adafactor(tmp_path: Path) -> None:
    changes = {"optimizer": SMALL, "train__mixed_precision": "bf16", "train__full_bf16": True}
    parts, lines = make_parts(tmp_path, **changes), estimate(count(tmp_path, **changes), PLAIN).gpu
    engine = parts.engine
    assert isinstance(engine, TorchEngine)
    rates = dict.fromkeys(parts.rates, 1e-3)
    engine.begin_step(rates, 1)
    engine.backward(parts.prepare(parts.feed.batch(0)))
    engine.step(rates, 1)
    learning = list(engine.params.values())
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    assert lines["weights"] == sizes(learning) == 2 * sum(param.numel() for param in learning)
    assert lines["optimizer"] == sizes(states) < lines["weights"] // 5
    assert lines["gradients"] == 2 * max(param.numel() for param in learning)


def test_choices_that_change_the_training_are_shown_but_not_chosen(tmp_path: Path) -> None:
    counts = simple_counts(mixed=True, shapes=((2**15, 2**15),))
    estimates = {one.choice.name: one for one in estimate_all(counts)}
    names = [name for name, one in estimates.items() if one.choice.alters]
    assert len(names) == 3 and list(estimates)[-3:] == names
    smallest = estimates[names[-1]]
    assert smallest.gpu["weights"] == 2 * GIB and smallest.gpu["optimizer"] < GIB // 100
    assert cheapest_fit(list(estimates.values()), gpu_memory=smallest.gpu_total) is None or (
        estimates["ZeRO-2, optimizer on host"].gpu_total <= smallest.gpu_total
    )
    none = {one.choice.name for one in estimate_all(counts, world=2)}
    assert not none & set(names), "one GPU's choices"
    again = estimate_all(simple_counts(mixed=True, fused=True, bf16_weights=True, optimizer="adafactor"))
    assert [one.choice.name for one in again] == ["torch"]


def test_the_traffic_of_offload_in_a_step() -> None:
    """Test the bytes moved per step (see DeepSpeed's sources).

    Gradients go to the host in float32, weights return in 16 bits, and accumulated sums move both ways.
    """
    counts, part = simple_counts(mixed=True), GIB // 2
    sent = {one.choice.name: one.traffic for one in estimate_all(counts, world=2)}
    assert sent["torch"] == sent["ZeRO-3"] == {"to_host": 0, "to_gpu": 0}
    assert sent["ZeRO-2, optimizer on host"] == {"to_host": 4 * part, "to_gpu": 2 * part}
    assert sent["ZeRO-3, weights on host"] == {"to_host": 2 * part, "to_gpu": 2 * 2 * part}
    assert sent["ZeRO-3, optimizer on host"] == {"to_host": 6 * part, "to_gpu": 4 * part}
    assert sent["ZeRO-3, optimizer and weights on host"] == {"to_host": 6 * part, "to_gpu": 6 * part}
    summing = estimate(simple_counts(mixed=True, micros=3), CHOICES[4], world=2)
    assert summing.traffic == {"to_host": (3 * 2 + 4) * part, "to_gpu": 3 * 2 * part}
    assert summing.traffic_seconds(25e9) == pytest.approx(10 * part / 25e9)


def test_stage_3_shards_the_frozen_parts_that_gradients_pass_through() -> None:
    """Test an embedding on 2 billion frozen weights, which fit a small GPU only if they are sharded."""
    counts = simple_counts(learning=(1000,), passed=2 * GIB, frozen=5 * GIB, mixed=True, nvme=True)
    estimates = {one.choice.name: one for one in estimate_all(counts, world=2)}
    assert estimates["ZeRO-2"].gpu["frozen"] == 5 * GIB and estimates["ZeRO-2"].gpu["weights"] == 2000
    shared, lent = estimates["ZeRO-3"], estimates["ZeRO-3, weights on host"]
    assert shared.gpu["frozen"] == lent.gpu["frozen"] == GIB
    assert shared.gpu["weights"] == 2 * (GIB + 500) and lent.gpu["weights"] == 0
    assert lent.host["weights"] == shared.gpu["weights"] and "weights" not in shared.host
    assert lent.gpu["gathered"] == 2 * 550_000_000, "what DeepSpeed keeps and fetches ahead"
    # Fetched in both passes, since stage 3 cannot keep so many; the few trained weights return once.
    assert lent.traffic == {"to_host": 2 * 500, "to_gpu": 2 * 2 * (GIB + 500)}
    starting = estimates["ZeRO-2"].gpu_moments["starting"] - lent.gpu_moments["starting"]
    # Sharded weights wait on the host; stage 2 holds all of its trained weights and a clone of its half.
    assert starting == 4 * GIB + 2 * (1000 + 500)
    assert lent.host_moments["exporting"] - lent.host_moments["training"] == 4 * 1000 + 4 * GIB


def test_states_on_nvme_leave_one_group_on_the_host() -> None:
    counts = simple_counts(mixed=True)
    names = [one.choice.name for one in estimate_all(counts)]
    assert not any("NVMe" in name for name in names), "only where the recipe names a disk"
    estimates = {
        one.choice.name: one
        for one in estimate_all(simple_counts(mixed=True, nvme=True, learning=(2**20,) * 1024))
    }
    on_host, on_disk = (
        estimates["ZeRO-3, optimizer and weights on host"],
        estimates["ZeRO-3, optimizer on NVMe, weights on host"],
    )
    assert on_disk.gpu == on_host.gpu and on_disk.traffic == on_host.traffic
    assert on_disk.host["optimizer"] == 8 * (100_000_000 + 2**20) and on_host.host["optimizer"] == 8 * GIB
    assert on_disk.disk == 32 * GIB and on_host.disk == 0
    assert on_disk.choice.settings["engine.offload_optimizer_device"] == "nvme"


def test_varying_prompts_fill_their_cache(tmp_path: Path) -> None:
    fixed, varied = count(tmp_path), count(tmp_path, data__shuffle_tags=True)
    assert 0 < fixed.text_embeddings < 2**20 and varied.text_embeddings == REMEMBERED
    assert count(tmp_path, method=WORD).text_embeddings == 0, "what learns is encoded again"


def test_weights_that_zero_shards_start_on_the_host() -> None:
    counts = simple_counts(encoding=GIB, mixed=True)
    start = {one.choice.name: one.gpu_moments["starting"] for one in estimate_all(counts)}
    assert start["torch"] - start["ZeRO-3"] == 4 * GIB
    assert start["ZeRO-2"] - start["ZeRO-3"] == 2 * 2 * GIB - GIB, (
        "stage 2 clones the weights, after encoding"
    )
    drawing = estimate(simple_counts(encoding=GIB, mixed=True, class_drawing=3 * GIB), CHOICES[3])
    assert drawing.gpu_moments["starting"] - start["ZeRO-3"] == 2 * GIB + 3 * GIB - GIB


@pytest.mark.parametrize("method", [DREAMBOOTH, WORD], ids=["dreambooth", "word"])
def test_estimates_equal_the_bytes_of_all_tensors_of_a_run(tmp_path: Path, method: dict[str, Any]) -> None:
    changes = {"method": method, "engine": {"use_ema": True}}
    parts, lines = make_parts(tmp_path, **changes), estimate(count(tmp_path, **changes), PLAIN).gpu
    engine = parts.engine
    assert isinstance(engine, TorchEngine) and engine.ema is not None
    take_step(parts)
    engine.backward(parts.prepare(parts.feed.batch(1)))
    learning = list(engine.params.values())
    every = torch.nn.ModuleList([*parts.model.modules().values(), parts.method])
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    assert lines["weights"] == sizes(learning)
    assert lines["gradients"] == sizes(param.grad for param in learning)
    assert lines["optimizer"] == sizes(states)
    assert lines["average"] == sizes(engine.ema.shadow.values())
    assert lines["frozen"] == sizes([*every.parameters(), *every.buffers()]) - sizes(learning)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("method", [DREAMBOOTH, WORD], ids=["dreambooth", "word"])
def test_a_fake_pass_allocates_as_much_as_a_real_one(
    tmp_path: Path, method: dict[str, Any], checkpointing: bool
) -> None:
    changes = {"method": method, "train__gradient_checkpointing": checkpointing, "train__train_batch_size": 4}
    parts, fake = make_parts(tmp_path, **changes), count(tmp_path, **changes).full
    assert fake == trace_real_step(parts)
    # An independent count: the tensors that autograd saves.
    assert fake.held == pytest.approx(saved_bytes(parts), rel=0.05)


def saved_bytes(parts: Parts) -> int:
    learned = {p.untyped_storage().data_ptr() for p in parts.method.parameters()}
    learned |= {
        p.untyped_storage().data_ptr() for m in parts.model.modules().values() for p in m.parameters()
    }
    saved: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # keeps the tensor alive, so that no address is reused
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        parts.method(parts.prepare(parts.feed.batch(0)))
    return sum(size for place, size in saved.items() if place not in learned)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # seconds; the first use compiles CPU Adam
def test_zero_uses_the_estimated_memory(tmp_path: Path) -> None:
    tiny.make_recipe(tmp_path)
    script = Path(__file__).parents[2] / "support" / "zero_held.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    assert len(results) > 20
    # The run of an embedding is so small that the step counters matter.
    for name, (
        held,
        predicted,
    ) in results.items():
        assert held == pytest.approx(predicted, rel=0.02, abs=30_000), name


def test_normalisation_runs_in_float32_as_on_a_gpu() -> None:
    norm, narrow = torch.nn.GroupNorm(1, 2), torch.ones(1, 2, 4, dtype=torch.bfloat16)
    with precision(torch.bfloat16) as autocast, autocast():
        assert norm(narrow).dtype == torch.float32
        assert torch.nn.Linear(4, 4)(norm(narrow)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(narrow).dtype == torch.bfloat16


@pytest.mark.parametrize(("stage", "gigabytes"), [(None, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_estimates_equal_the_numbers_of_the_zero_paper(stage: int | None, gigabytes: float) -> None:
    """Test figure 1 of Rajbhandari et al. 2020: 7.5 billion parameters, mixed precision, Adam, 64 GPUs."""
    nothing = Pass(0, 0, 0)
    counts = Counts((7_500_000_000,), frozen=0, model=0, full=nothing, half=nothing, bucket=0, mixed=True)
    lines = estimate(counts, EngineChoice("", stage), world=64).gpu
    states = sum(lines[line] for line in ("weights", "master", "gradients", "optimizer"))
    assert states / 1e9 == pytest.approx(gigabytes, abs=0.05)


def simple_counts(**changes: Any) -> Counts:
    step = Pass(held=GIB, activations=GIB, together=4 * GIB)
    counts = {"learning": (GIB,), "frozen": GIB, "model": 4 * GIB, "full": step, "half": step, "bucket": 0}
    return Counts(**(counts | changes))


def test_gradients_grow_as_activations_are_freed() -> None:
    counts = simple_counts()
    alone, shared = estimate(counts, PLAIN).gpu, estimate(counts, PLAIN, world=2).gpu
    # Gradients on their way: all are sent and received in buckets; the sums of a worker's half follow.
    assert alone["buffers"] == 0 and shared["buffers"] == 2 * 4 * GIB + 2 * GIB
    assert alone["activations"] == shared["activations"] == 0
    kept = estimate(simple_counts(micros=2), PLAIN).gpu
    assert kept["activations"] == GIB and kept["gradients"] == alone["gradients"] == 4 * GIB
    half = estimate(counts, CHOICES[3], world=2).gpu
    assert half["gradients"] == 2 * GIB and half["activations"] + half["gradients"] == 5 * GIB // 2


def test_the_cheapest_that_fits_is_chosen() -> None:
    estimates = estimate_all(simple_counts(), world=1)
    assert [one.choice for one in estimates if not one.choice.alters] == list(CHOICES)
    choose = {limit: cheapest_fit(estimates, gpu_memory=limit * GIB) for limit in (20, 12, 3)}
    chosen = {limit: one.choice.name if one else None for limit, one in choose.items()}
    assert chosen == {20: "torch", 12: "ZeRO-2, optimizer on host", 3: None}
    assert cheapest_fit(estimates, gpu_memory=12 * GIB, host_memory=8 * GIB) is None
    alone = estimate_all(simple_counts(optimizer="adamw8bit"), world=2)
    assert [one.choice.name for one in alone] == ["torch"]
    small = estimate(simple_counts(optimizer="adamw8bit"), PLAIN).gpu["optimizer"]
    assert small == pytest.approx(2 * GIB, rel=0.04)


def test_what_an_optimizer_does_not_support_is_not_planned() -> None:
    def names(optimizer: str) -> set[str]:
        return {one.choice.name for one in estimate_all(simple_counts(optimizer=optimizer, mixed=True))}

    assert {"ZeRO-3", "torch, fused backward"} <= names("lion")
    assert not {name for name in names("lion") if "on host" in name and "weights on host" not in name}
    assert names("prodigy") & {"torch, fused backward", "ZeRO-2"} == set()
    assert estimate(simple_counts(optimizer="lion"), CHOICES[3]).gpu["optimizer"] == 4 * GIB
    states = estimate(simple_counts(optimizer="prodigy"), PLAIN)
    assert states.gpu["optimizer"] == 16 * GIB


def test_every_worker_of_a_host_counts() -> None:
    apart, together = (
        estimate(simple_counts(latents=GIB), PLAIN, world=4, workers_per_host=many).host_moments
        for many in (1, 4)
    )
    assert together["training"] == 4 * apart["training"]
    # Weights, moments and step counts are copied, and the weights once more to be written.
    copied = 4 * GIB + simple_counts().states + 4 * GIB
    assert apart["saving"] - apart["training"] == together["saving"] - together["training"] == copied


@pytest.mark.slow
def test_stable_diffusion_15_is_planned_from_its_configs_alone(sd15: Path, tmp_path: Path) -> None:
    recipe = tiny.write_recipe(
        tmp_path / "recipe.yaml", tiny.make_recipe(tmp_path, data__resolution=512, train__train_batch_size=1)
    )
    words = ["plan", str(recipe), f"model.pretrained_model_name_or_path={sd15}"]
    options = ["train.mixed_precision=bf16", "train.gradient_checkpointing=true", "--gpu-memory", "8GiB"]
    answer = json.loads(CliRunner().invoke(program.app, [*words, *options, "--json"]).stdout)
    assert answer["parameters"] == SD15 and answer["counts"]["learning"] == SD15["unet"]
    assert answer["chosen"] == "ZeRO-2, optimizer on host" and answer["pictures"] == 6
    plain, chosen = answer["estimates"][0], next(e for e in answer["estimates"] if e["fits"])
    assert plain["gpu"]["weights"] == plain["gpu"]["gradients"] == 4 * SD15["unet"]
    assert chosen["gpu"]["weights"] == 2 * SD15["unet"] and chosen["gpu"]["gradients"] == 0
    assert plain["gpu_total"] > 8 * GIB >= chosen["gpu_total"] == max(chosen["gpu_moments"].values())
    assert plain["gpu"]["frozen"] == pytest.approx(4 * SD15["vae"] + 2 * SD15["text_encoder"], rel=1e-4)
    assert chosen["traffic"]["to_host"] == 4 * SD15["unet"] and answer["pcie_bytes_per_second"] == 25e9
    assert chosen["traffic"]["seconds"] == pytest.approx(4 * SD15["unet"] / 25e9)
    table = CliRunner().invoke(program.app, [*words, *options, "--pcie", "8GB/s"])
    assert "8 GB/s" in table.stdout and "optimizer.name=adafactor" in table.stdout
    assert table.exit_code == 0 and "> ZeRO-2, optimizer on host" in table.stdout
    assert "engine.zero_stage=2 engine.offload_optimizer_device=cpu" in table.stdout


def test_a_small_disk_of_the_planning_machine_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(tiny.write_recipe(tmp_path / "recipe.yaml", tiny.make_recipe(tmp_path)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    result = CliRunner().invoke(program.app, ["plan", recipe, "--gpu-memory", "8GiB"])
    assert result.exit_code == 0 and "Warning: output_dir: a run needs" in result.stderr
    assert "free. Free some space" in result.stderr and "On disk" not in result.stdout


def test_the_command_reports_that_nothing_fits_and_a_missing_limit(tmp_path: Path) -> None:
    recipe = str(tiny.write_recipe(tmp_path / "recipe.yaml", tiny.make_recipe(tmp_path)))
    result = CliRunner().invoke(program.app, ["plan", recipe, "--gpu-memory", "100MiB"])
    assert result.exit_code == 2 and "0.1 GiB per GPU" in result.stderr
    assert "train.gradient_checkpointing=true" in result.stderr and "ZeRO-3" in result.stdout
    large = ["data.resolution=256", "train.gradient_checkpointing=true", "train.train_batch_size=1"]
    starting = CliRunner().invoke(program.app, ["plan", recipe, *large, "--gpu-memory", "100MiB"])
    assert "data.cache_latents=false" in starting.stderr and "checkpointing" not in starting.stderr
    host = ["plan", recipe, "--gpu-memory", "8GiB", "--host-memory", "1MiB"]
    assert "engine.nvme_path" in CliRunner().invoke(program.app, host).stderr
    assert (
        "nvme_path"
        not in CliRunner().invoke(program.app, [*host, "engine.nvme_path=/fast"]).stderr.partition("What")[2]
    )
    assert (
        "optimizer on NVMe"
        in CliRunner().invoke(program.app, ["plan", recipe, "engine.nvme_path=/fast"]).stdout
    )
    free = CliRunner().invoke(program.app, ["plan", recipe])
    assert free.exit_code == 0 and "Give --gpu-memory" in free.stdout and "fits" not in free.stdout
    wrong = CliRunner().invoke(program.app, ["plan", recipe, "--gpu-memory", "12GX"])
    assert wrong.exit_code == 2 and "--gpu-memory '12GX'" in wrong.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GiB", 12 * GIB), ("24GB", 24 * 10**9), ("8192MiB", 8 * GIB), ("1.5g", 3 * GIB // 2)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text, option="--gpu-memory") == size


@pytest.mark.parametrize("text", ["12", "GiB", "-1GiB", "0GiB", "1e3MB", "12 GiB of it"])
def test_invalid_sizes_are_rejected(text: str) -> None:
    with pytest.raises(ResourceError, match="size"):
        parse_size(text, option="--gpu-memory")


def test_class_images_and_previews_count(tmp_path: Path) -> None:
    quiet = count(tmp_path)
    prior = {"name": "dreambooth", "with_prior_preservation": True}
    drawing = count(tmp_path, validation={"prompts": ["a cat"]}, method=prior, data__random_flip=True)
    assert quiet.drawing == 0 < drawing.drawing and quiet.encoding > 0
    assert drawing.latents == 2 * quiet.latents  # six images and their mirrored copies
    assert drawing.full.held > 1.5 * quiet.full.held  # class images double the batch
    uncached = count(tmp_path, data__cache_latents=False)
    assert uncached.encoding == uncached.latents == 0 < uncached.full.activations
