"""Memory and speed on a GPU: what fits 6 to 12 GB, predicted and measured, and pictures a second beside diffusers.

Each case is a recipe on a full-size model made from its published configs with random weights, trained through the
loop for some steps on synthetic latents, in a process of its own, with torch held to the card that the case imitates
(`engine.gpu_memory`): it has to finish there, not only to report a peak. `predicted` is what `dreamfleet plan` tells
for the same recipe. What is drawn and encoded before and between the steps is left out.

    python benchmarks/gpu.py [--cases sd15-ti-6g,speed] [--plan] [--small]

`--plan` predicts only, which needs no GPU; `--small` runs every case with narrow models, on a CPU too.
Needs torch, diffusers, transformers and pydantic; the cases of ZeRO, DeepSpeed as well.
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
    """Train a case's steps on the card it imitates; returns what was predicted and what was seen."""
    from dreamfleet.trainers.distributed.device import TRAINING, on_device

    with on_device(remedies=TRAINING) as device:
        return _run_on(device, name, small=small)


def _run_on(device: torch.device, name: str, *, small: bool) -> dict[str, Any]:
    from dreamfleet.trainers.loop import Hooks, Schedule, train

    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(name, Path(folder), small=small)
        told = predict(recipe)
        if device.type == "cuda":
            torch.cuda.init()
        method, engine, batch, why = build_parts(recipe, device)
        stamps: list[float] = []

        def stamp(line: dict[str, Any]) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())

        outcome = train(
            method,
            engine,
            iter(lambda: dict(batch), None),
            lambda ready: ready,
            rates={group.name: lambda step: 1e-6 for group in engine.groups},
            schedule=Schedule(total=STEPS, save_every=10**9, sample_every=10**9, log_every=1),
            seed=0,
            hooks=Hooks(log=stamp),
        )
        engine.close()
    told |= {"settled": why, "loss": outcome.figures.get("loss")}
    # The first step still fills caches.
    told["seconds_a_step"] = round((stamps[-1] - stamps[1]) / (len(stamps) - 2), 4)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved()
        told |= {"peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 2)}
        told |= {"peak_reserved_gib": round(peak / GIB, 2)}
        if told.get("predicted_without_cuda_gib"):
            allocated = torch.cuda.max_memory_allocated() / GIB
            told["predicted_over_measured"] = round(told["predicted_without_cuda_gib"] / allocated, 3)
    return told


def in_process_of_its_own(name: str, *, small: bool) -> dict[str, Any]:
    """Run one case in a fresh process, whose failure is a result too."""
    words = [sys.executable, __file__, "--case", name, *(["--small"] if small else [])]
    env = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["?"])[-1][:400]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare_offload(results: dict[str, Any]) -> None:
    """Say beside each offloading case what it costs over none, and what its traffic takes at the measured rates."""
    plain = results.get(OFFLOADS[0], {}).get("seconds_a_step")
    rates = results.get("pcie", {})
    for name in OFFLOADS[1:]:
        told = results.get(name, {})
        if plain and "seconds_a_step" in told:
            told["seconds_over_none"] = round(told["seconds_a_step"] - plain, 4)
        if told.get("crosses_pcie_bytes") and rates.get("to_gpu_gb_per_s"):
            sent = told["crosses_pcie_bytes"]
            floor = max(
                sent[way] / rates[f"{way}_gb_per_s"] / 1e9 for way in ("to_gpu", "to_host") if way in sent
            )
            told["pcie_floor_seconds"] = round(floor, 4)


def main() -> None:
    """Run the cases asked for, each written as soon as it is there."""
    parser = argparse.ArgumentParser()
    every = [*CASES, "speed", "pcie"]
    parser.add_argument("--cases", default=",".join(every))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(run_case(asked.case, small=asked.small)))
        return
    if not (asked.plan or asked.small or torch.cuda.is_available()):
        sys.exit(
            "benchmarks/gpu.py: no GPU here; --plan predicts without one, --small tries the cases on narrow models"
        )
    results: dict[str, Any] = {}
    for name in asked.cases.split(","):
        if name not in every:
            parser.error(f"no case {name!r}; there are {', '.join(every)}")
        if name in CASES:
            case = CASES[name]
            told: dict[str, Any] = {"what": case.words, "family": case.family, "pixels": case.pixels}
            told["card_gib"] = case.card
            if asked.plan:
                with tempfile.TemporaryDirectory() as folder:
                    told |= predict(make_recipe(name, Path(folder), small=asked.small))
            else:
                told |= in_process_of_its_own(name, small=asked.small)
        elif asked.plan:
            continue
        else:
            told = measure_speed(small=asked.small) if name == "speed" else copy_rates()
        results[name] = told
        compare_offload(results)
        if asked.small:
            print(json.dumps({name: told}, indent=1), flush=True)
        else:
            how = f"python benchmarks/gpu.py {'--plan ' if asked.plan else ''}--cases {asked.cases}"
            write_result("gpu_plan" if asked.plan else "gpu", {"cases": results}, how=how)


if __name__ == "__main__":
    main()
