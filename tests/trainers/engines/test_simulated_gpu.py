"""Test every GPU code path on a simulated CUDA device; simulated_gpu/__init__.py explains what that can show.

Each kind of case runs in its own process, because torch cannot remove a device. Only selected cases run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import simulated_gpu
import tiny
from simulated_gpu import cases, on_ray, ranks, special

HERE = Path(__file__).resolve().parents[2] / "support"
WHOLE_MATRIX = "DREAMFLEET_GPU_MATRIX"  # set by `make test-gpu-matrix`
ROWS = [row.name for row in (cases.all_rows() if os.environ.get(WHOLE_MATRIX) else cases.chosen_rows())]
LIMIT = 1800  # seconds for all cases of one kind, on a busy machine
Report = Callable[[str], dict[str, Any]]

pytestmark = [
    pytest.mark.simulated_gpu,
    pytest.mark.timeout(LIMIT + 300),  # the first test of a kind waits for all its cases
    pytest.mark.skipif(
        simulated_gpu.missing() is not None, reason=f"no simulated GPU: {simulated_gpu.missing()}"
    ),
]


def environment(**more: str) -> dict[str, str]:
    """Return the environment variables of the case processes; they import from the paths of this process.

    A test that ran in this process may have set DeepSpeed's accelerator to the CPU.
    """
    paths = [str(HERE), *(path for path in sys.path if path)]
    inherited = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    return {**inherited, "PYTHONPATH": os.pathsep.join(paths), **more}


def lines_of(process: subprocess.Popen[str], log: Path) -> dict[str, dict[str, Any]]:
    """Return the JSON results of a process by case; the key "" holds an error with the end of its log."""
    try:
        written, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # faulthandler then writes the stacks of all threads
        written, _ = process.communicate()
    lines = [json.loads(line) for line in written.splitlines() if line.startswith('{"case"')]
    end = {"error": f"exit code {process.returncode}\n{log.read_text()[-3000:]}"}
    return {"": end, **{line["case"]: line for line in lines}}


def start(module: str, *words: str, log: Path, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-X", "faulthandler", "-m", f"simulated_gpu.{module}", *words]
    with log.open("w") as handle:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=handle,
            text=True,
            env=environment(**more),
            cwd=HERE.parents[1],
        )


def make_workplace(folder: Path) -> Path:
    tiny.make_recipe(folder)
    tiny.make_images(folder / "held", 2, seed=5)
    return folder


@pytest.fixture(scope="module")
def names(request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """Return the names of the selected cases, keyed by test function."""
    found: dict[str, list[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.path == Path(__file__) and hasattr(item, "callspec"):
            found.setdefault(item.originalname, []).append(item.callspec.params["name"])
    return found


@pytest.fixture(scope="module")
def one_gpu(names: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Run all cases of one process with two GPUs; return a function from case name to result."""
    log = tmp_path_factory.mktemp("one-gpu") / "log"
    chosen = [name for test, some in names.items() if test.startswith("test_one_gpu") for name in some]
    results = lines_of(start("runs", *chosen, log=log), log)
    return lambda name: results.get(name, results[""])


@pytest.fixture(scope="module")
def two_ranks(names: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Run all cases of two ranks; return a function from case name to result, of a failed rank if any."""
    folder = make_workplace(tmp_path_factory.mktemp("ranks"))
    chosen = names["test_two_ranks_train_with_a_gpu_each"]
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes = [start("ranks", str(rank), str(folder), *chosen, log=logs[rank]) for rank in range(2)]
    try:
        results = [lines_of(*pair) for pair in zip(processes, logs, strict=True)]
    finally:
        for process in processes:
            process.kill()
    every = lambda name: [one.get(name, one[""]) for one in results]  # noqa: E731
    return lambda name: next((one for one in every(name) if one["error"]), every(name)[0])


@pytest.fixture(scope="module")
def ray(names: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Run all cases on a Ray cluster; return a function from case name to result."""
    folder = make_workplace(tmp_path_factory.mktemp("ray"))
    inject = os.pathsep.join([str(HERE / "simulated_gpu" / "inject"), environment()["PYTHONPATH"]])
    # The length of a socket path is limited, and pytest's folders have long paths.
    with tempfile.TemporaryDirectory(prefix="df-") as short:
        log, more = folder / "log", {"PYTHONPATH": inject, "SIMULATED_GPUS": "2", "RAY_TMPDIR": short}
        results = lines_of(
            start("on_ray", str(folder), *names["test_ray_gives_workers_gpus"], log=log, **more), log
        )
    return lambda name: results.get(name, results[""])


@pytest.mark.parametrize("name", ROWS)
def test_one_gpu_stops_resumes_and_releases_memory(one_gpu: Report, name: str) -> None:
    results = one_gpu(name)
    assert results["error"] is None, results["error"]
    assert results["steps"] == cases.STEPS and results["exports"]
    waits = {where: count for where, count in results["waits"].items() if not may_wait(results, where)}
    assert not waits, f"a step waits for the GPU: {waits}"
    check_left(results, leaks="zero-3" in results["engine"].lower())


@pytest.mark.parametrize("name", sorted(special.SPECIAL))
def test_one_gpu_special_case(one_gpu: Report, name: str) -> None:
    results = one_gpu(name)
    assert results["error"] is None, results["error"]
    check_left(results, leaks=name.startswith("bench-"))


@pytest.mark.parametrize("name", list(ranks.CASES))
def test_two_ranks_train_with_a_gpu_each(two_ranks: Report, name: str) -> None:
    results = two_ranks(name)
    assert results["error"] is None, results["error"]
    assert results["steps"] == 3 and not results["warnings"]
    assert not results["elsewhere"], "a rank used the other's GPU"


@pytest.mark.cluster
@pytest.mark.parametrize("name", list(on_ray.CASES))
def test_ray_gives_workers_gpus(ray: Report, name: str) -> None:
    results = ray(name)
    assert results["error"] is None, results["error"]


def test_cases_are_derived_from_the_registries(tmp_path: Path) -> None:
    """Test that the cases contain every switch, choice and engine, with one check per kind of option."""
    rows = cases.with_options(cases.chosen_rows(), tmp_path)
    ridden = {(key, str(value)) for row in rows for key, value in row.options.items()}
    assert {
        ("engine.channels_last", "True"),
        ("validation.scheduler", "dpm++"),
        ("engine.zero_stage", "3"),
    } <= ridden
    assert {("method.with_prior_preservation", "True"), ("method.aesthetic_slerp", "tokens")} <= ridden
    for fields in ((0, 1), (0, 2), (1, 2)):  # every allowed pair
        pairs = {tuple(row[field] for field in fields) for row in cases.all_rows()}
        assert pairs == {tuple(row[field] for field in fields) for row in rows}


def may_wait(results: dict[str, Any], where: str) -> bool:
    """Return whether a step may synchronise at a line.

    In DeepSpeed, in the libraries of Prodigy, which read their estimate of the rate, and in GradScaler for optimizers
    without a fused step.
    """
    unfused = "aesthetic" in results["case"] or results["options"].get("optimizer.name", "adamw") != "adamw"
    line = where.rpartition(" @ ")[2]
    return line.startswith(("[deepspeed", "[prodigyopt", "[prodigyplus")) or (
        unfused and "-fp16" in results["case"] and "trainers/engines/torch_engine.py" in line
    )


def check_left(results: dict[str, Any], *, leaks: bool) -> None:
    """Raise AssertionError if a case left GPU memory or a memory limit behind, or used another GPU."""
    assert not results["warnings"]
    assert not results["elsewhere"], "the other GPU was used"
    assert not results["limited"], "a limit of memory outlived its run"
    # DeepSpeed leaves reference cycles.
    assert leaks or results["left"] <= 0, f"{results['left']} bytes stay on the GPU"
