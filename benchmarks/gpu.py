"""Measures memory and speed on a GPU: runs within 6 to 12 GB, and images per second compared with diffusers.

Each case is a recipe on a full-size model with random weights, built from its published configs. It trains
some steps on synthetic latents in a separate process, with torch limited to the memory of the GPU that the
case stands for (`engine.gpu_memory`): it must complete within that memory, not only report a peak.
`predicted` is the estimate of `dreamfleet plan` for the same recipe. Sampling and encoding are not measured.

    python benchmarks/gpu.py [--cases sd15-ti-6g,speed] [--plan] [--small]

`--plan` only estimates, which needs no GPU; `--small` runs every case with narrow models, on a CPU too. Needs torch,
diffusers, transformers and pydantic; the cases of ZeRO also DeepSpeed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_cases import CASES, GIB, STEPS, build_parts, make_recipe, predict
from gpu_speed import copy_rates, measure_speed
from measure import write_result

OFFLOADS = ("no-offload", "offload-optimizer", "offload-weights")


def run_case(name: str, *, small: bool) -> dict[str, Any]:
    """Train the steps of a case within the memory of its GPU; return the estimate and the measurements."""
    from dreamfleet.trainers.distributed.device import TRAINING, on_device

    with on_device(remedies=TRAINING) as device:
        return _run_on(device, name, small=small)


def _run_on(device: torch.device, name: str, *, small: bool) -> dict[str, Any]:
    from dreamfleet.trainers.engines.passes import drive
    from dreamfleet.trainers.loop import Hooks, Schedule, train

    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(name, Path(folder), small=small)
        record = predict(recipe)
        if device.type == "cuda":
            torch.cuda.init()
        _, engine, batch, why = build_parts(recipe, device)
        peaks = {}
        if device.type == "cuda":
            peaks["starting"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        stamps: list[float] = []

        def stamp(line: dict[str, Any]) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())

        outcome = drive(
            train(
                engine,
                iter(lambda: dict(batch), None),
                lambda ready: ready,
                rates={group.name: lambda step: 1e-6 for group in engine.groups},
                schedule=Schedule(total=STEPS, save_every=10**9, sample_every=10**9, log_every=1),
                seed=0,
                hooks=Hooks(log=stamp),
            )
        )
        engine.close()
    record |= {"settled": why, "loss": outcome.figures.get("loss")}
    # The first step fills caches.
    record["seconds_a_step"] = round((stamps[-1] - stamps[1]) / (len(stamps) - 2), 4)
    if device.type == "cuda":
        peaks["training"] = torch.cuda.max_memory_allocated()
        record["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
        record["peaks_gib"] = {phase: round(size / GIB, 2) for phase, size in peaks.items()}
        if planned := record.get("predicted_moments_gib"):
            record["predicted_over_measured"] = {
                phase: round(planned[phase] / (size / GIB), 3) for phase, size in peaks.items() if size
            }
    return record


def in_process_of_its_own(name: str, *options: str) -> dict[str, Any]:
    """Run one case in a new process; return its result, or its error as a result."""
    words = [sys.executable, __file__, "--case", name, *options]
    env = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"failed": (done.stderr.strip().splitlines() or ["?"])[-1][:400]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare_offload(results: dict[str, Any]) -> None:
    """Add to each case with offload its extra time, and the time of its transfers at the measured rates."""
    plain = results.get(OFFLOADS[0], {}).get("seconds_a_step")
    rates = results.get("pcie", {})
    for name in OFFLOADS[1:]:
        record = results.get(name, {})
        if plain and "seconds_a_step" in record:
            record["seconds_over_none"] = round(record["seconds_a_step"] - plain, 4)
        if record.get("crosses_pcie_bytes") and rates.get("to_gpu_gb_per_s"):
            sent = record["crosses_pcie_bytes"]
            floor = max(
                sent[way] / rates[f"{way}_gb_per_s"] / 1e9 for way in ("to_gpu", "to_host") if way in sent
            )
            record["pcie_floor_seconds"] = round(floor, 4)


def one_case(asked: argparse.Namespace) -> dict[str, Any]:
    """Run the case ``asked.case`` in this process; return its result."""
    if asked.case == "pcie":
        return copy_rates()
    if asked.case == "speed":
        return measure_speed(
            small=asked.small,
            batches=tuple(int(size) for size in asked.batches.split(",") if size),
            ways=tuple(way for way in asked.ways.split(",") if way),
        )
    return run_case(asked.case, small=asked.small)


def main() -> None:
    """Run the requested cases, and write each result immediately."""
    parser = argparse.ArgumentParser()
    every = [*CASES, "speed", "pcie"]
    parser.add_argument("--cases", default=",".join(every))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--batches", default="", help="batch sizes of the case speed, such as 8,16")
    parser.add_argument("--ways", default="", help="variants of the case speed, such as plain,channels_last")
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(one_case(asked)))
        return
    if not (asked.plan or asked.small or torch.cuda.is_available()):
        sys.exit(
            "benchmarks/gpu.py: no GPU here; --plan predicts without one, --small tries the cases on narrow models"
        )
    results: dict[str, Any] = {}
    for name in asked.cases.split(","):
        if name not in every:
            parser.error(f"no case {name!r}; known: {', '.join(every)}")
        if name in CASES:
            case = CASES[name]
            record: dict[str, Any] = {"what": case.words, "family": case.family, "pixels": case.pixels}
            record["card_gib"] = case.card
            if asked.plan:
                with tempfile.TemporaryDirectory() as folder:
                    record |= predict(make_recipe(name, Path(folder), small=asked.small))
            else:
                record |= in_process_of_its_own(name, *(["--small"] if asked.small else []))
        elif asked.plan:
            continue
        else:
            record = one_case(argparse.Namespace(**vars(asked) | {"case": name}))
        results[name] = record
        compare_offload(results)
        if asked.small:
            print(json.dumps({name: record}, indent=1), flush=True)
        else:
            how = f"python benchmarks/gpu.py {'--plan ' if asked.plan else ''}--cases {asked.cases}"
            write_result("gpu_plan" if asked.plan else "gpu", {"cases": results}, how=how)


if __name__ == "__main__":
    main()
