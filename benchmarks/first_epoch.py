"""Measures the first epoch of a run by how its images get encoded: first step, end of the epoch, and waiting.

The images are JPEG files of 1280 x 1024 pixels (see data.py), trained at 64 px (or SIDE) with LoRA on the pocket model,
by one worker with one CPU of a private Ray with two. The ways, each a command of its own, alternate:

- `resident`: all images are encoded before the first step, and kept in memory;
- `stream`: no latents are kept; every image is decoded by Ray tasks, and encoded in the step that uses it;
- `before`: `dreamfleet data cache` fills a cache, then the run reads it (both commands count);
- `while_training`: the run fills the cache as it needs images;
- `with_actor`: the same, with one process of one CPU that encodes ahead (`data.cache_resources`).

The runs that use a cache or memory must have equal losses. Seconds count from the start of the (first) command.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from data import DREAMBENCH, FILES, make_photos
from measure import spread, write_result

ROUNDS, SIDE, BATCH = int(os.environ.get("ROUNDS", "1")), int(os.environ.get("SIDE", "64")), 4
STEPS = FILES // BATCH
ENCODED = ("resident", "before", "while_training", "with_actor")  # ways whose losses must be equal
WAYS: dict[str, dict[str, Any]] = {
    "with_actor": {"cache_dir": "cache", "cache": "while_training", "cache_resources": {"CPU": 1}},
    "while_training": {"cache_dir": "cache", "cache": "while_training"},
    "before": {"cache_dir": "cache"},
    "stream": {"source": "stream"},
    "resident": {},
}


def write_recipe(folder: Path, photos: Path, way: str) -> Path:
    """Write the recipe of one way and return its path."""
    recipe = {
        "method": {"name": "dreambooth", "lora_rank": 8},
        "model": {"pretrained_model_name_or_path": "pocket"},
        "data": {
            "instance_data_dir": str(photos),
            "instance_prompt": "a photo of sks",
            "resolution": SIDE,
            **WAYS[way],
        },
        "train": {"max_train_steps": STEPS, "train_batch_size": BATCH, "log_steps": 1, "seed": 0},
        "scaling": {"num_workers": 1, "resources_per_worker": {"CPU": 1}},
        "output_dir": "run",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Return the whole lines of metrics that a run has written so far."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def measure(folder: Path, photos: Path, way: str) -> tuple[dict[str, float], list[float]]:
    """Run one way from nothing; return its figures and its losses."""
    folder.mkdir()
    recipe = write_recipe(folder, photos, way)
    program = [str(Path(sys.executable).with_name("python")), "-m", "dreamfleet.cluster.cli"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    began, first, last = time.perf_counter(), 0.0, 0.0
    with (folder / "log").open("w") as log:
        options: dict[str, Any] = {"cwd": folder, "stdout": log, "stderr": log, "env": environment}
        if way == "before":
            subprocess.run([*program, "data", "cache", str(recipe)], check=True, **options)
        process = subprocess.Popen([*program, "train", str(recipe)], **options)
        while not last:
            time.sleep(0.02)
            done = len(steps_of(folder / "run"))
            first = first or (time.perf_counter() - began if done else 0.0)
            last = time.perf_counter() - began if done >= STEPS else 0.0
            if not last and process.poll() is not None:
                raise RuntimeError(f"{way} ended early:\n{(folder / 'log').read_text()[-3000:]}")
        if process.wait():
            raise RuntimeError(f"{way} failed:\n{(folder / 'log').read_text()[-3000:]}")
    summary = json.loads((folder / "run" / "summary.json").read_text())
    figures = {
        "seconds_to_first_step": first,
        "seconds_to_end_of_epoch": last,
        "seconds_of_steps": last - first,
        "data_wait_fraction": summary["figures"]["data_wait_fraction"],
    }
    return figures, [line["loss"] for line in steps_of(folder / "run")]


def main() -> None:
    """Measure all ways alternately and write the result."""
    if not DREAMBENCH.is_dir():
        sys.exit(f"no photos at {DREAMBENCH}: set DREAMBENCH to the DreamBooth dataset's folder")
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_photos(folder / "photos")
        for _ in range(ROUNDS):
            losses: dict[str, list[float]] = {}
            for way in WAYS:
                figures, losses[way] = measure(folder / way, folder / "photos", way)
                shutil.rmtree(folder / way)
                rounds[way].append(figures)
                print(way, figures, flush=True)
            for way in ENCODED:
                assert losses[way] == losses["before"], f"{way} has other losses"
    ways = {
        way: {key: spread([one[key] for one in found]) for key in found[0]} for way, found in rounds.items()
    }
    ratios = {
        way: {
            key: spread([one[key] / base[key] for one, base in zip(found, rounds["before"], strict=True)])
            for key in ("seconds_to_first_step", "seconds_to_end_of_epoch")
        }
        for way, found in rounds.items()
        if way != "before"
    }
    write_result(
        "first_epoch",
        {"images": FILES, "side": SIDE, "batch": BATCH, "steps": STEPS, "ways": ways, "to_before": ratios},
        how="python benchmarks/first_epoch.py",
    )


if __name__ == "__main__":
    main()
