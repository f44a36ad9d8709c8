"""Test that ZeroEngine trains like TorchEngine at every stage; each resumes from the other's checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tiny_models import tiny_family
from zero_ranks import HAS_LIBAIO, RESUMED, RUNS

from dreamfleet.datasets.errors import CheckpointError, RecipeError, ResourceError
from dreamfleet.trainers.config.engine import EngineConfig
from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.distributed.device import explain_out_of_memory
from dreamfleet.trainers.engines.zero_engine import ZeroEngine
from dreamfleet.trainers.engines.zero_nvme import SwapFolder, build_swapping
from dreamfleet.trainers.engines.zero_setup import build_op, import_deepspeed, sole_builder, zero_config
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import assemble
from dreamfleet.trainers.run.dry_run import check_run

HERE = Path(__file__).parents[2] / "support"
SWAPS = pytest.mark.skipif(not HAS_LIBAIO, reason="libaio-dev is not installed: apt-get install libaio-dev")
COMPILES = 1800  # seconds; the first use compiles CPU Adam, which takes minutes on a busy machine


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    """Return the results of two ranks by case and engine; the processes run once for all tests here."""
    folder = tmp_path_factory.mktemp("zero")
    tiny.make_recipe(folder)  # both ranks read the models
    tiny_family("sdxl").save_folder(folder / "sdxl")
    command = [sys.executable, str(HERE / "zero_ranks.py"), str(folder)]
    with ExitStack() as stack:
        logs = [stack.enter_context((folder / f"{rank}.log").open("w")) for rank in range(2)]
        ranks = [
            stack.enter_context(
                subprocess.Popen([*command, str(rank), "2"], stdout=subprocess.PIPE, stderr=logs[rank])
            )
            for rank in range(2)
        ]
        try:
            printed = [rank.communicate(timeout=COMPILES - 60)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    for rank in range(2):
        assert ranks[rank].returncode == 0, (folder / f"{rank}.log").read_text()[-3000:]
    assert printed == [b"", b""], "stdout carries results, not DeepSpeed's talk"
    return torch.load(folder / "results.pt", weights_only=True)


def largest_difference(left: dict[str, Any], right: dict[str, Any]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def share_beyond(limit: float, left: dict[str, Any], right: dict[str, Any]) -> float:
    """Return the share of elements, from 0 to 1, that differ by more than the limit."""
    beyond = sum(int(((left[name] - right[name]).abs() > limit).sum()) for name in left)
    return beyond / sum(value.numel() for value in left.values())


def moments(saved: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        f"{number}/{name}": value
        for number, state in saved["state"]["optimizer"]["state"].items()
        for name, value in state.items()
    }


def average(saved: dict[str, Any]) -> dict[str, torch.Tensor]:
    return saved["state"].get("ema", saved["learned"])


@pytest.mark.slow
@pytest.mark.timeout(COMPILES)
@pytest.mark.parametrize(
    ("method", "name"),
    [pytest.param(*run, marks=[SWAPS] * ("nvme" in run[1])) for run in RUNS if run[1] != "torch"],
)
def test_every_stage_trains_like_torch(results: dict[Any, dict[str, Any]], method: str, name: str) -> None:
    """Test losses, norms, weights, moments, averages, weights of previews and exports, and the checkpoint."""
    expected, found = results[method, "torch"], results[method, name]
    # DeepSpeed computes with bfloat16 weights, torch with float32 weights.
    half, large = method.startswith("bf16") and name != "zero 0", "pocket" in method
    close = 5e-3 if half else 1e-5 if large else 1e-6
    assert found["losses"] == pytest.approx(expected["losses"], rel=close)
    assert found["norms"] == pytest.approx(
        expected["norms"], rel=0.1 if half and large else 5e-2 if half else 1e-5
    )
    assert found["averaged loss"] == pytest.approx(expected["averaged loss"], rel=close)
    torch.testing.assert_close(found["encoded"], expected["encoded"], rtol=0, atol=0.1 if half else 1e-5)
    # At a learning rate of 1e-3, two Adam steps move a weight by 2e-3, in either direction if its gradient is
    # only rounding error. This affects a hypernetwork, whose weights start near zero, and a few of the pocket
    # model's millions of weights. In addition, the last gradient is computed at slightly different weights.
    limit = 6e-3 if half else 2e-3 if large else 2e-4 if method == "hypernetwork" else 5e-6
    ours, theirs = found["final"], expected["final"]
    if large and not half:
        assert share_beyond(2e-4, ours["learned"], theirs["learned"]) < 1e-5
    assert largest_difference(ours["learned"], theirs["learned"]) < limit
    assert largest_difference(average(ours), average(theirs)) < limit
    assert largest_difference(moments(ours), moments(theirs)) < (1e-3 if half else 1e-5 if large else 1e-7)
    assert all(value.dtype == torch.float32 for value in ours["learned"].values())
    assert largest_difference(found["whole"], average(found["saved"])) == 0
    assert largest_difference(found["whole unet"], expected["whole unet"]) < limit
    # Stage 3 keeps half of the U-Net, frozen or not, and some padding on each of the two ranks.
    assert found["kept"] == pytest.approx(0.5 if "zero 3" in name else 1.0, rel=0.02)
    groups = [saved["state"]["optimizer"]["param_groups"] for saved in (ours, theirs)]
    assert [group.keys() for group in groups[0]] == [group.keys() for group in groups[1]]


@pytest.mark.slow
@pytest.mark.timeout(COMPILES)
@pytest.mark.parametrize(("source", "target"), RESUMED)
def test_every_engine_resumes_from_every_checkpoint(
    results: dict[Any, dict[str, Any]], source: str, target: str
) -> None:
    straight, found = results["dreambooth", source], results["resumed", source, target]
    # CPU Adam computes its powers of beta step by step.
    exact = source == target and "offload" not in source
    limit = 0 if exact else 1e-6
    assert abs(found["losses"][0] - straight["losses"][-1]) <= limit
    assert abs(found["norms"][0] - straight["norms"][-1]) <= limit
    assert largest_difference(found["final"]["learned"], straight["final"]["learned"]) <= limit
    assert largest_difference(found["final"]["state"]["ema"], straight["final"]["state"]["ema"]) <= limit
    assert largest_difference(moments(found["final"]), moments(straight["final"])) <= limit


@SWAPS
@pytest.mark.slow
@pytest.mark.timeout(COMPILES)
@pytest.mark.parametrize("source", ["torch", "zero 3 states on nvme"])
def test_states_on_disk_resume_from_a_checkpoint(results: dict[Any, dict[str, Any]], source: str) -> None:
    straight, found = results["pocket", source], results["resumed", source, "zero 3 states on nvme"]
    assert found["losses"][0] == straight["losses"][-1]
    assert largest_difference(found["final"]["learned"], straight["final"]["learned"]) <= 2e-5
    assert largest_difference(moments(found["final"]), moments(straight["final"])) <= 1e-8
    assert found["swapped"] > 3, "the states never left memory"
    assert results["left on disk"] == ["dreamfleet-swap-gate"], "a run that ends removes its files"


@pytest.mark.slow
@pytest.mark.timeout(COMPILES)
@pytest.mark.parametrize("name", ["torch", "zero 2"])
@pytest.mark.parametrize("change", ["grown", "shrunk"])
def test_another_number_of_workers_resumes_with_the_same_batches(
    results: dict[Any, dict[str, Any]], change: str, name: str
) -> None:
    """Test that two workers with half the batch each resume a run of one worker, and one that of two."""
    found = results[change, name]
    straight = found["straight"]
    assert found["losses"][0] == pytest.approx(straight["losses"][-1], rel=1e-5)
    assert found["norms"][0] == pytest.approx(straight["norms"][-1], rel=1e-4)
    assert largest_difference(found["final"]["learned"], straight["final"]["learned"]) < 2e-5
    assert largest_difference(moments(found["final"]), moments(straight["final"])) < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(COMPILES)
@pytest.mark.parametrize("stage", ["1", "3"])
def test_tensors_that_need_padding_are_written_and_gathered(
    results: dict[Any, dict[str, Any]], stage: str
) -> None:
    found = results["round trip", stage]
    assert largest_difference(found["gathered"], found["wanted"]) == 0
    weight, bias = found["wanted"]["weight"], found["wanted"]["bias"]
    assert torch.equal(found["computed"], torch.nn.functional.linear(torch.ones(2, 5), weight, bias))


@pytest.mark.parametrize("case", json.loads((HERE / "zero_configs.json").read_text()))
def test_deepspeeds_json(case: dict[str, Any]) -> None:
    assert zero_config(EngineConfig(**case["engine"]), **case["given"]) == case["deepspeed"]


@pytest.mark.parametrize(
    ("engine", "way_out"),
    [
        ({"offload_optimizer_device": "cpu"}, "zero_stage: 1, 2 or 3"),
        ({"zero_stage": 0, "offload_optimizer_device": "cpu"}, "zero_stage: 1, 2 or 3"),
        ({"zero_stage": 2, "offload_param_device": "cpu"}, "needs zero_stage: 3"),
        ({"zero_stage": 4}, "zero_stage"),
        ({"zero_stage": 2, "offload_optimizer_device": "nvme", "nvme_path": "/fast"}, "needs zero_stage: 3"),
        ({"zero_stage": 3, "offload_optimizer_device": "nvme"}, "needs nvme_path"),
        ({"zero_stage": 3, "offload_optimizer_device": "nvme", "nvme_path": "fast"}, r"fast\)"),
        (
            {"zero_stage": 3, "offload_optimizer_device": "nvme", "nvme_path": "/fast", "use_ema": True},
            "set use_ema: false",
        ),
        (
            {"zero_stage": 3, "offload_param_device": "nvme", "nvme_path": "/fast"},
            "set train.mixed_precision: bf16",
        ),
    ],
)
def test_conflicting_settings_are_errors(tmp_path: Path, engine: dict[str, Any], way_out: str) -> None:
    with pytest.raises(RecipeError, match=way_out):
        build_recipe(tiny.make_recipe(tmp_path, engine=engine))


def test_missing_requirements_of_zero_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"adamw8bit .*engine\.zero_stage"):
        build_recipe(make_tree(tmp_path, optimizer__name="adamw8bit"))
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # simulates a missing DeepSpeed
    with pytest.raises(ResourceError, match="pip install --no-build-isolation deepspeed"):
        assemble(build_recipe(make_tree(tmp_path)), DistributedContext())


def test_without_a_compiler_offload_is_an_error_with_remedy(tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from dreamfleet.datasets.errors import ResourceError\n"
        "from dreamfleet.trainers.engines.zero_setup import import_deepspeed, make_cpu_adam\n"
        "import_deepspeed(torch.device('cpu'))\n"
        "try: make_cpu_adam(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]))\n"
        "except ResourceError as error: print(error)\n"
    )
    bare = {**os.environ, "PATH": str(tmp_path), "CXX": "", "TORCH_EXTENSIONS_DIR": str(tmp_path / "ops")}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=False, timeout=300
    )
    assert "apt-get install g++" in ended.stdout, ended.stderr[-2000:]


@pytest.mark.parametrize("error", [TypeError("not NoneType"), Exception("CUDA_HOME does not exist")])
def test_without_the_cuda_toolkit_nvme_is_an_error_with_remedy(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    import_deepspeed(torch.device("cpu"))
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.ops.op_builder.pin_memory import PinMemoryBuilder

    def fail(self: Any, verbose: bool = False) -> None:
        raise error

    monkeypatch.setattr(PinMemoryBuilder, "load", lambda self, verbose: None)
    monkeypatch.setattr(AsyncIOBuilder, "load", fail)
    with pytest.raises(ResourceError, match=r"CUDA toolkit.*offload to cpu"):
        build_swapping()


@pytest.mark.parametrize("before", range(8))
def test_a_loss_scale_resumes_inside_its_growth_window(before: int) -> None:
    import_deepspeed(torch.device("cpu"))
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    def engine_at(steps: int) -> tuple[Any, Any]:
        scaler = DynamicLossScaler(2.0**8, 3, 1.0, 1, False)
        for _ in range(steps):
            scaler.update_scale(False)
        engine = object.__new__(ZeroEngine)
        engine.stage, engine.device = 2, torch.device("cpu")
        engine.engine = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))
        return engine, scaler

    (saved, straight), (loaded, resumed) = engine_at(before), engine_at(0)
    state = saved._scaler_state()
    assert 0 <= state["_growth_tracker"] < 3, "torch reads it too"
    loaded._load_scaler(state)
    for _ in range(8):
        straight.update_scale(False)
        resumed.update_scale(False)
        assert resumed.cur_scale == straight.cur_scale
    assert straight.cur_scale > 2.0**8


def test_ops_are_compiled_without_debugging_symbols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Builder:
        NAME = "an_op"

        def cxx_args(self) -> list[str]:
            return ["-O3", "-g", "-Wall"]

        def load(self, *, verbose: bool) -> None:
            seen.extend(self.cxx_args())

    seen: list[str] = []
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    build_op(Builder(), what="", needs="", instead="")
    assert seen == ["-O3", "-Wall"]


def test_files_of_a_killed_compiler_do_not_block_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    left = tmp_path / "cpu_adam" / "lock"
    left.parent.mkdir()
    left.touch()  # torch would wait for this lock forever
    with sole_builder("cpu_adam"):
        assert not left.exists()


def test_a_swap_folder_belongs_to_one_process_and_stale_ones_are_removed(tmp_path: Path) -> None:
    parent = tmp_path / "nvme"
    left = parent / "dreamfleet-swap-dead"
    left.mkdir(parents=True)
    (left / "weights.swp").write_bytes(b"gigabytes")
    first, second = SwapFolder(str(parent)), SwapFolder(str(parent))
    assert not left.exists() and first.path.is_dir() and first.path != second.path
    second.close()
    assert first.path.is_dir() and not second.path.exists()
    first.close()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ResourceError, match=r"engine\.nvme_path: .*written"):
        SwapFolder(str(blocked))


def test_the_folder_of_a_running_process_is_not_removed(tmp_path: Path) -> None:
    code = "import sys; from dreamfleet.trainers.engines.zero_nvme import SwapFolder\n"
    code += "folder = SwapFolder(sys.argv[1]); print(folder.path, flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    held = Path(other.stdout.readline().strip())
    assert held.parent == tmp_path
    SwapFolder(str(tmp_path)).close()
    assert held.is_dir()
    other.kill()
    other.communicate()
    SwapFolder(str(tmp_path)).close()
    assert not held.exists()


def make_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    return tiny.make_recipe(folder, **{"engine": {"zero_stage": 2}, **changes})


def test_a_single_process_trains_resumes_and_rejects_other_checkpoints(tmp_path: Path) -> None:
    """Test that without Ray, the engine creates and destroys its own process group."""
    small = assemble(build_recipe(make_tree(tmp_path)), DistributedContext())
    small.engine.backward(small.prepare(small.feed.batch(0)))
    small.engine.step({"unet": 1e-3}, 1)
    learned, state = small.engine.weights(), small.engine.state()
    small.engine.close()
    assert not torch.distributed.is_initialized()
    both = {"name": "dreambooth", "train_text_encoder": True}
    large = assemble(build_recipe(make_tree(tmp_path, method=both)), DistributedContext())
    with pytest.raises(RecipeError, match="parameters of the saved state"):
        large.engine.load_weights(learned)
    with pytest.raises(CheckpointError, match="does not fit"):
        large.engine.load_state(state)
    large.engine.close()
    averaging = assemble(build_recipe(make_tree(tmp_path, engine__use_ema=True)), DistributedContext())
    averaging.engine.load_weights(learned)
    assert largest_difference(averaging.engine.weights(), learned) == 0
    with pytest.raises(CheckpointError, match="without an average"):
        averaging.engine.load_state(state)
    averaging.engine.close()


def test_check_tries_the_engine(tmp_path: Path) -> None:
    lines = {line.name: line for line in check_run(build_recipe(make_tree(tmp_path)))}
    assert all(line.ok for line in lines.values()), lines
    assert "loss" in lines["step"].detail and "diffusers" in lines["export"].detail
    assert not torch.distributed.is_initialized()


def test_an_out_of_memory_error_names_remedies() -> None:
    with (
        pytest.raises(ResourceError, match=r"offload_optimizer_device: cpu.*--resume"),
        explain_out_of_memory(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more")
