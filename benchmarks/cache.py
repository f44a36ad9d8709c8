"""Measures the seconds to the first step with and without a latent cache, and the cost of encoding the cache.

Several hundred photos are derived from those of the DreamBooth dataset (cropped, slightly rotated and
mirrored, JPEG of 512 px) in a temporary folder; the model is the pocket model, without Ray. Each run is a
separate process that trains to its first step; runs with and without the cache alternate. Then 60 steps give
the images per second for latents in memory, for latents read from the cache when needed, and for images that
are decoded and encoded at each use, as for a set that does not fit into memory.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from measure import spread, write_result
from PIL import Image
from startup import time_to_file

ROOT = Path(__file__).parent.parent
DREAMBENCH = Path(os.environ.get("DREAMBENCH", ROOT.parent / "shared/data/dreambench"))
ROUNDS, PHOTOS = int(os.environ.get("ROUNDS", "3")), int(os.environ.get("PHOTOS", "320"))
SIDES, SIDE = (64, 256), 512
DREAMFLEET = [sys.executable, "-m", "dreamfleet.cluster.cli"]


def make_photos(folder: Path) -> None:
    """Write different photos: random crops of the real ones, slightly rotated, every other one mirrored."""
    folder.mkdir()
    files, rng = sorted(DREAMBENCH.glob("*/*.jpg")), np.random.default_rng(0)
    for number in range(PHOTOS):
        with Image.open(files[number % len(files)]) as opened:
            photo = opened.convert("RGB").rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC)
        side = int(min(photo.size) * rng.uniform(0.6, 0.85))
        left, top = (int(rng.integers(0, room - side + 1)) for room in photo.size)
        photo = photo.crop((left, top, left + side, top + side)).resize(
            (SIDE, SIDE), Image.Resampling.LANCZOS
        )
        if number % 2:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        photo.save(folder / f"{number:04d}.jpg", quality=92)


def write_recipe(folder: Path, side: int) -> Path:
    """Write a recipe of native training on the photos, with the cache in the same folder."""
    recipe = {
        "method": {"name": "native"},
        "data": {
            "instance_data_dir": str(folder / "photos"),
            "instance_prompt": "a photo",
            "resolution": side,
            "cache_dir": str(folder / "cache"),
        },
        "train": {
            "max_train_steps": 1,
            "train_batch_size": 4,
            "log_steps": 100,
            "export_formats": ["safetensors"],
        },
        "scaling": {"num_workers": 0, "use_gpu": False},
        "report_to": [],
        "output_dir": str(folder / "run"),
    }
    path = folder / f"recipe-{side}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def cpu_seconds() -> float:
    """Return the CPU seconds of all ended child processes, which do not depend on other load on the machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def loss_of(run: Path) -> float:
    """Return the loss of a run's first step."""
    return float(json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"])


def measure_side(folder: Path, side: int) -> dict[str, Any]:
    """Build the cache for one resolution, and train to the first step with and without it."""
    recipe = str(write_recipe(folder, side))
    made = json.loads(
        subprocess.run(
            [*DREAMFLEET, "data", "cache", recipe, "--json"], check=True, capture_output=True
        ).stdout
    )
    again = json.loads(
        subprocess.run(
            [*DREAMFLEET, "data", "cache", recipe, "--json"], check=True, capture_output=True
        ).stdout
    )
    assert made["encoded"] == again["reused"] == PHOTOS, (made, again)
    seconds: dict[str, list[float]] = {"with_cache": [], "without": []}
    cpu: dict[str, list[float]] = {"with_cache": [], "without": []}
    for number in range(ROUNDS):
        losses = []
        for name, change in (("with_cache", []), ("without", ["data.cache_dir=null"])):
            run = folder / f"{name}-{side}-{number}"
            command = [*DREAMFLEET, "train", recipe, f"output_dir={run}", *change]
            before = cpu_seconds()
            seconds[name].append(time_to_file(command, run / "metrics.jsonl"))
            cpu[name].append(cpu_seconds() - before)
            losses.append(loss_of(run))
        assert losses[0] == losses[1], losses
    pairs = zip(seconds["without"], seconds["with_cache"], strict=True)
    return {
        "seconds_to_first_step": {name: spread(values) for name, values in seconds.items()},
        "ratio_without_to_with": spread([without / cached for without, cached in pairs]),
        "cpu_seconds_of_the_run": {name: spread(values) for name, values in cpu.items()},
        "first_losses_equal": True,
        "data_cache": {
            "seconds": made["seconds"],
            "pictures_per_second": made["pictures_per_second"],
            "seconds_when_nothing_is_new": again["seconds"],
            "bytes_per_picture": made["bytes"] / PHOTOS,
        },
    }


def measure_steps(folder: Path) -> dict[str, Any]:
    """Measure the images per second of the three sources of latents, alternately."""
    recipe = str(write_recipe(folder, SIDES[0]))
    ways = {
        "resident": ["data.source=resident"],
        "read_when_needed": ["data.source=stream"],
        "decoded_and_encoded_at_each_use": ["data.cache_dir=null", "data.cache_latents=false"],
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS):
        for name, changes in ways.items():
            run = folder / f"steps-{name}-{number}"
            command = [
                *DREAMFLEET,
                "train",
                recipe,
                f"output_dir={run}",
                "train.max_train_steps=60",
                *changes,
            ]
            before = cpu_seconds()
            subprocess.run(command, check=True, capture_output=True)
            cpu[name].append(cpu_seconds() - before)
            rates[name].append(json.loads((run / "summary.json").read_text())["figures"]["images_per_second"])
    return {
        name: {"pictures_per_second": spread(rates[name]), "cpu_seconds_of_the_run": spread(cpu[name])}
        for name in ways
    }


def main() -> None:
    """Run all measurements and write the result."""
    if not DREAMBENCH.is_dir():
        sys.exit(f"no photos at {DREAMBENCH}: set DREAMBENCH to the DreamBooth dataset's folder")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_photos(folder / "photos")
        sides = {f"{side}px": measure_side(folder, side) for side in SIDES}
        steps = measure_steps(folder)
    write_result(
        "cache",
        {"photos": PHOTOS, **sides, f"60_steps_{SIDES[0]}px": steps},
        how="python benchmarks/cache.py",
    )


if __name__ == "__main__":
    main()
