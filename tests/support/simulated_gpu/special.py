"""Cases on the simulated GPU in addition to the rows: commands, limits, errors, searches and the benchmark.

Each case is a function of a folder with a tiny model and images; it raises an error if it fails.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

import simulated_gpu
from dreamfleet.datasets.errors import ResourceError

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "benchmarks"))

WORD = {"name": "textual_inversion", "placeholder_token": "<thing>", "initializer_token": "cat"}
LITTLE = 64 * 2**10  # bytes of GPU memory, too few for any model
SPECIAL: dict[str, Callable[[Path], None]] = {}
#: Cases that set the size of the GPU's memory.
SIMULATED_ONLY = (
    "too-little-memory-ends-a-run-and-leaves-nothing",
    "too-little-memory-is-an-error-of-every-command",
)


def special(function: Callable[[Path], None]) -> Callable[[Path], None]:
    """Register a function as a case under its name."""
    SPECIAL[function.__name__.replace("_", "-")] = function
    return function


def run_of(folder: Path, name: str, **changes: Any) -> Any:
    """Train a recipe on the GPU in a separate folder; return the summary."""
    from dreamfleet.trainers.run.run import run_worker

    return run_worker(recipe_of(folder, name, **changes), device="cuda", resume=True)


def recipe_of(folder: Path, name: str, **changes: Any) -> Any:
    from dreamfleet.trainers.recipe import build_recipe

    options = {"output_dir": str(folder / "runs" / name), "train__max_train_steps": 2, **changes}
    return build_recipe(tiny.make_recipe(folder, **options))


def command(*words: Any) -> Any:
    """Run a `dreamfleet` command in this process."""
    from dreamfleet.cluster.cli import program

    return CliRunner().invoke(program.app, [str(word) for word in words])


def used() -> int:
    """Return the bytes in use on the first GPU."""
    gc.collect()
    return simulated_gpu.ext.usage(0)[0]


@special
def a_limit_is_planned_by_and_lifted(folder: Path) -> None:
    summary = run_of(folder, "limited", method=WORD, engine__gpu_memory="20GB")
    assert "not planned" not in summary.engine
    assert simulated_gpu.ext.limit_of(0) == simulated_gpu.MEMORY
    recipe, held = recipe_of(folder, "shared", method=WORD), []
    from dreamfleet.trainers.run.run import run_worker

    def look() -> bool:
        held.append(simulated_gpu.ext.limit_of(0))
        return False

    run_worker(recipe, device="cuda", gpu_share=0.5, should_stop=look)
    assert 0.49 < held[0] / simulated_gpu.MEMORY < 0.5, "a share of the GPU, less CUDA's context"


@special
def too_little_memory_ends_a_run_and_leaves_nothing(folder: Path) -> None:
    before = used()
    with simulated_gpu.memory_of(2 * 2**20):  # enough for the model, not for a step
        with pytest.raises(ResourceError, match=r"train\.gradient_checkpointing") as held:
            run_of(folder, "too-large", train__train_batch_size=64, data__resolution=64)
        assert used() <= before, f"{held.value!r} keeps the run alive"


@special
def too_little_memory_is_an_error_of_every_command(folder: Path) -> None:
    tree = tiny.make_recipe(folder, output_dir=str(folder / "runs/error"))
    recipe = tiny.write_recipe(folder / "error.yaml", tree)
    model = folder / "model"
    commands: dict[str, list[Any]] = {
        "check": ["check", recipe],
        "train": ["train", recipe],
        "cache": ["data", "cache", recipe, f"data.cache_dir={folder / 'no-latents'}"],
        "sample": ["sample", "--model", model, "--prompt", "a cat", "--out", folder / "grid.png"],
        "score": ["score", model, "--prompt", "a cat", "--real", folder / "held", "--clip", "pocket"],
    }
    with simulated_gpu.memory_of(LITTLE):
        for name, words in commands.items():
            result = command(*words)
            output = result.output
            assert result.exit_code == 2, (name, result.exit_code, output)
            assert "ran out of memory" in output and "Traceback" not in output, (name, output)


@special
def check_tries_a_step_on_the_gpu(folder: Path) -> None:
    recipe = tiny.write_recipe(folder / "check.yaml", tiny.make_recipe(folder, train__mixed_precision="fp16"))
    result = command("check", recipe, "--json")
    assert result.exit_code == 0, result.output
    assert all(line["ok"] for line in json.loads(result.stdout))


@special
def a_word_draws_on_the_gpu(folder: Path) -> None:
    run_of(folder, "word", method=WORD, train__export_formats=["pt"])
    drawn = folder / "drawn.png"
    word = folder / "runs/word/exports/word.pt"
    words = ["--embedding", word, "--prompt", "a word", "--num-images", 1, "--steps", 2, "--out", drawn]
    result = command("sample", "--model", folder / "model", *words)
    assert result.exit_code == 0 and drawn.exists(), result.output


@special
def trials_leave_nothing_whatever_their_end(folder: Path) -> None:
    from task_sources import ListSource

    from dreamfleet.trainers.packing.runner import run_tasks
    from dreamfleet.trainers.packing.task import Task

    before = used()
    for number, (rate, end) in enumerate([(1e38, "failed"), (1e-3, "completed"), (1e-3, "completed")]):
        recipe = recipe_of(
            folder,
            f"search/trial-{number}",
            train__max_train_steps=3,
            optimizer__learning_rate=rate,
            optimizer__fused_backward=True,
            optimizer__max_grad_norm=0,
            validation__holdout=str(folder / "held"),
            validation__steps=1,
        )
        source = ListSource([Task("trial", recipe.model_dump(mode="json"), ("holdout_loss",))])
        run_tasks(source, capacity=1, device="cuda", gpu_share=0.5)
        assert source.ends["trial"].exit_reason == end, source.ends
        assert used() <= before, f"trial {number} left {used() - before} bytes"


@special
def a_cache_holds_the_latents_of_a_run_in_half_precision(folder: Path) -> None:
    from dreamfleet.trainers.distributed.context import DistributedContext
    from dreamfleet.trainers.driver.build_cache import cache_latents
    from dreamfleet.trainers.run.build import assemble

    half = {"train__mixed_precision": "bf16", "train__full_bf16": True}
    cached = recipe_of(folder, "cached", data__cache_dir=str(folder / "cache"), **half)
    cache_latents(cached)
    distributed = DistributedContext(device=torch.device("cuda"))
    both = [
        assemble(recipe, distributed).feed.batch(0) for recipe in (cached, recipe_of(folder, "own", **half))
    ]
    assert torch.equal(both[0]["latents"], both[1]["latents"])


@special
def moments_go_on_in_another_layout(folder: Path) -> None:
    for last, channels_last in enumerate((True, False, True), start=1):
        changes = {"engine__channels_last": channels_last, "train__max_train_steps": last}
        assert run_of(folder, "layouts", engine__use_ema=True, **changes).steps == last


@special
def the_start_of_zero_is_planned(folder: Path) -> None:
    from gpu_cases import build_parts, make_recipe

    from dreamfleet.trainers.distributed.device import best_device
    from dreamfleet.trainers.memory.estimate import CUDA_CONTEXT, KERNEL_WORKSPACE
    from dreamfleet.trainers.memory.plan import plan_memory

    recipe = make_recipe("offload-optimizer", folder / "start", small=True)
    made = next(
        one for one in plan_memory(recipe).estimates if one.choice.name == "ZeRO-2, optimizer on host"
    )
    planned = made.gpu["frozen"] + 2 * made.gpu["weights"]
    assert planned <= made.gpu_moments["starting"] - CUDA_CONTEXT - KERNEL_WORKSPACE
    before = used()
    torch.cuda.reset_peak_memory_stats()
    engine = build_parts(recipe, best_device(), settle=False)[1]
    peak = torch.cuda.max_memory_allocated() - before
    engine.close()
    assert 0.99 * planned < peak < 1.01 * planned, (peak, planned)


def _benchmark(name: str, folder: Path) -> None:
    import gpu
    from gpu_speed import copy_rates, measure_speed

    if name == "speed":
        assert measure_speed(small=True)["pictures_per_second"]["ours"] > 0
    elif name == "pcie":
        assert copy_rates(2**20)["to_gpu_gb_per_s"] > 0
    else:
        figures = gpu.run_case(name, small=True)
        assert figures["loss"] > 0 and figures["peaks_gib"]["training"] >= 0 and figures["settled"], figures


def benchmark_cases() -> list[str]:
    """Return the names of the cases of ``make bench-gpu``."""
    from gpu_cases import CASES

    return [*CASES, "speed", "pcie"]


SPECIAL |= {f"bench-{name}": functools.partial(_benchmark, name) for name in benchmark_cases()}


@special
def packed_trainings_equal_trainings_alone(folder: Path) -> None:
    from dreamfleet.datasets.storage.storage import Storage
    from dreamfleet.trainers.packing.runner import train_packed
    from dreamfleet.trainers.run.checkpoint import Checkpoints

    lora = {"name": "dreambooth", "lora_rank": 2, "lora_dropout": 0.1, "train_text_encoder": True}
    methods = [WORD, {**WORD, "num_vectors": 3}, lora, {**lora, "lora_rank": 3}, {"name": "hypernetwork"}]
    options = {
        "train__mixed_precision": "bf16",
        "train__checkpointing_steps": 1,
        "optimizer__adam_epsilon": 1e-3,
    }
    trees = {
        f"{kind}-{number}": {**options, "method": method, "train__seed": number}
        for kind in ("packed", "alone")
        for number, method in enumerate(methods)
    }
    packed = [recipe_of(folder, name, **tree) for name, tree in trees.items() if name.startswith("packed")]
    ends = train_packed(packed, capacity=len(packed), device="cuda")
    assert [end.error for end in ends] == [None] * len(packed)
    for number in range(len(methods)):
        run_of(folder, f"alone-{number}", **trees[f"alone-{number}"])
        runs = [
            Checkpoints(Storage(str(folder / "runs" / f"{kind}-{number}"))) for kind in ("packed", "alone")
        ]
        for step in (1, 2):
            ours, theirs = (checkpoints.load(step).learned for checkpoints in runs)
            for name, tensor in theirs.items():
                assert ours[name].dtype == tensor.dtype == torch.float32
                # bf16 rounds sums of other orders differently; Adam moves each weight by at most the rate.
                assert torch.allclose(ours[name], tensor, rtol=0.02, atol=2e-3 * step), (number, name)
