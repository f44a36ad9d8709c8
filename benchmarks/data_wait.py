"""Measures how long a training waits for streamed images, at 64 and 512 px, on a Ray with two CPUs.

The images are JPEG files of 1280 x 1024 pixels (see data.py). `training`: LoRA on the pocket model, in batches of four,
which computes on the CPUs that also decode. `gpu_like`: the same batches, prepared by the same feed, for a step that
takes one second of no CPU, as on a GPU. `data_wait_fraction` is the part of the steps' time in which the next batch was
not there; `waits` are the seconds that the stream waited, by cause, which a thread does ahead of the steps.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from data import DREAMBENCH, make_photos
from measure import write_result

from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import assemble
from dreamfleet.trainers.run.run import run_worker

GPU_STEPS, GPU_SECONDS = int(os.environ.get("GPU_STEPS", "20")), 1.0
STEPS = {64: 40, 512: 3}  # of the training, by size in pixels


def recipe_of(folder: Path, photos: Path, side: int, steps: int) -> Any:
    """Return the recipe of a streamed training."""
    return build_recipe(
        {
            "method": {"name": "dreambooth", "lora_rank": 8},
            "model": {"pretrained_model_name_or_path": "pocket"},
            "data": {
                "instance_data_dir": str(photos),
                "instance_prompt": "a photo of sks",
                "resolution": side,
                "source": "stream",
            },
            "train": {"max_train_steps": steps, "train_batch_size": 4, "log_steps": 1, "seed": 0},
            "scaling": {"num_workers": 1},
            "output_dir": str(folder / f"{side}"),
        }
    )


def train(folder: Path, photos: Path, side: int) -> dict[str, Any]:
    """Train, and return what the summary says."""
    recipe = recipe_of(folder, photos, side, STEPS[side])
    began = time.perf_counter()
    run_worker(recipe)
    summary = json.loads((folder / f"{side}" / "summary.json").read_text())
    return {
        "steps": STEPS[side],
        "seconds_per_step": summary["train_seconds"] / STEPS[side],
        "data_wait_fraction": summary["figures"]["data_wait_fraction"],
        "waits": summary["data_waits"],
        "seconds": time.perf_counter() - began,
    }


def feed_gpu(folder: Path, photos: Path, side: int) -> dict[str, Any]:
    """Take batches for steps that leave the CPUs free; the wait for the first one is apart, as in a run."""
    parts = assemble(recipe_of(folder, photos, side, GPU_STEPS), DistributedContext(), keeps_files=False)
    batches = parts.feed.stream(0, GPU_STEPS + 1)
    before = time.perf_counter()
    next(batches)
    began, waited = time.perf_counter(), 0.0
    first = began - before
    for _ in range(GPU_STEPS):
        time.sleep(GPU_SECONDS)
        before = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - before
    total = time.perf_counter() - began
    waits = parts.feed.waits
    batches.close()
    return {
        "steps": GPU_STEPS,
        "seconds_per_step": total / GPU_STEPS,
        "seconds_to_first_batch": first,
        "data_wait_fraction": waited / total,
        "waits": waits,
    }


def main() -> None:
    """Run all measurements and write the result."""
    import ray

    if not DREAMBENCH.is_dir():
        sys.exit(f"no photos at {DREAMBENCH}: set DREAMBENCH to the DreamBooth dataset's folder")
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_photos(folder / "photos")
        for side in STEPS:
            found[f"{side}px"] = {
                "gpu_like": feed_gpu(folder, folder / "photos", side),
                "training": train(folder, folder / "photos", side),
            }
            print(side, found[f"{side}px"], flush=True)
    ray.shutdown()
    write_result("data_wait", found, how="python benchmarks/data_wait.py")


if __name__ == "__main__":
    main()
