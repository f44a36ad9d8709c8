"""Measures K trainings packed in one process against one ``dreamfleet train`` process each, one after the other.

Both sides are whole processes: start-up, training, checkpoint, export and report. The trainings of a pack differ in
seed, learning rate and size (vectors, rank, layers). Each packed training is compared with its own run alone: the
largest difference of a trained weight after the last step. Packs and single processes alternate. Environment variables:
METHODS, BATCHES, SLOTS (lists with commas), STEPS, THREADS.
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
from measure import RESULTS, describe_machine, write_result
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
STEPS = int(os.environ.get("STEPS", "100"))
THREADS = os.environ.get("THREADS", "1")
SLOTS = [int(number) for number in os.environ.get("SLOTS", "1,2,4,8,16,32").split(",")]
BATCHES = [int(number) for number in os.environ.get("BATCHES", "1,2").split(",")]
WORD = {"placeholder_token": "<my-cat>", "initializer_token": "cat face"}
# Method -> its section and learning rate for training number n.
CASES: dict[str, Any] = {
    "textual_inversion": lambda n: ({"name": "textual_inversion", **WORD, "num_vectors": 1 + n % 3}, 1e-3),
    "prompt_tuning": lambda n: ({"name": "prompt_tuning", **WORD, "num_vectors": 1 + n % 3}, 1e-3),
    "hypernetwork": lambda n: ({"name": "hypernetwork", "layer_structure": [1, 1 + n % 2, 1]}, 1e-4),
    "dreambooth_lora": lambda n: ({"name": "dreambooth", "lora_rank": 4 * 2 ** (n % 3)}, 1e-4),
    "native_lora": lambda n: ({"name": "native", "lora_rank": 4, "lora_target_modules": "all-linear"}, 1e-4),
}


def make_recipe(method: str, batch: int, number: int, output: Path) -> dict[str, Any]:
    """Return the recipe of training ``number`` of a pack as a plain tree."""
    section, rate = CASES[method](number)
    return {
        "method": section,
        "model": {"pretrained_model_name_or_path": "pocket"},
        "data": {
            "instance_data_dir": str(ROOT / "examples/cat/train"),
            "instance_prompt": "a sks cat face",
            "resolution": 64,
            "random_flip": True,
        },
        "train": {
            "max_train_steps": STEPS,
            "train_batch_size": batch,
            "seed": number,
            "checkpointing_steps": STEPS,
        },
        "optimizer": {"learning_rate": rate * (1 + number % 4)},
        "scaling": {"num_workers": 0, "use_gpu": False, "slots_per_worker": max(SLOTS)},
        "output_dir": str(output),
    }


def train_pack(paths: list[str]) -> None:
    """Train the recipes in these files in this process, all at once."""
    from dreamfleet.trainers.packing.runner import train_packed
    from dreamfleet.trainers.recipe import load_recipe

    ends = train_packed([load_recipe(path) for path in paths], capacity=len(paths))
    if failed := [end.error for end in ends if end.exit_reason != "completed"]:
        raise SystemExit(f"{len(failed)} trainings did not complete: {failed[0]}")


def run_command(command: list[str]) -> float:
    """Run a command to its end; return its wall-clock seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": THREADS, "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"failed: {' '.join(command[:4])}\n{done.stderr[-2000:]}")
    return time.perf_counter() - start


def write_recipes(folder: Path, method: str, batch: int, count: int) -> list[str]:
    """Write the recipe files of ``count`` trainings whose runs are below ``folder``; return their paths."""
    folder.mkdir(parents=True)
    paths = []
    for number in range(count):
        path = folder / f"{number}.yaml"
        path.write_text(yaml.safe_dump(make_recipe(method, batch, number, folder / f"run-{number}")))
        paths.append(str(path))
    return paths


def read_weights(folder: Path, number: int) -> dict[str, Any]:
    """Return the trained weights after the last step of a training."""
    return load_file(folder / f"run-{number}" / "checkpoints" / f"step-{STEPS:06d}" / "learned.safetensors")


def largest_difference(packed: Path, alone: Path, count: int) -> dict[str, float]:
    """Return the largest difference of a weight between the packed and the single runs, and the largest weight."""
    differences, weights = [0.0], [0.0]
    for number in range(count):
        ours, theirs = read_weights(packed, number), read_weights(alone, number)
        if ours.keys() != theirs.keys():
            raise RuntimeError(f"training {number} of {packed} trained other parameters than its run alone")
        differences += [float((ours[name] - theirs[name]).abs().max()) for name in ours]
        weights += [float(value.abs().max()) for value in theirs.values()]
    return {"largest_weight_difference": max(differences), "largest_weight": max(weights)}


def measure(method: str, batch: int, folder: Path) -> list[dict[str, Any]]:
    """Measure all pack sizes of a method; the single processes of a pack's trainings run just before the pack."""
    script = str(Path(sys.executable).with_name("dreamfleet"))
    singles = write_recipes(folder / "alone", method, batch, max(SLOTS))
    seconds: list[float] = []
    rows = []
    for slots in SLOTS:
        for path in singles[len(seconds) : slots]:
            seconds.append(run_command([script, "train", path]))
        packed = folder / f"packed-{slots}"
        paths = write_recipes(packed, method, batch, slots)
        together = run_command([sys.executable, __file__, "--pack", *paths])
        sequence = sum(seconds[:slots])
        rows.append(
            {
                "slots": slots,
                "packed_seconds": together,
                "sequential_seconds": sequence,
                "packed_trainings_per_hour": 3600 * slots / together,
                "sequential_trainings_per_hour": 3600 * slots / sequence,
                "ratio": sequence / together,
                **largest_difference(packed, folder / "alone", slots),
            }
        )
        print(method, f"batch {batch}", json.dumps(rows[-1]), flush=True)
        shutil.rmtree(packed)
    return rows


def main() -> None:
    """Measure the methods at every batch size; write them to the result, which keeps those of other methods."""
    if sys.argv[1:2] == ["--pack"]:
        train_pack(sys.argv[2:])
        return
    stored = RESULTS / "packing.json"
    before = json.loads(stored.read_text()) if stored.exists() else {}
    result: dict[str, Any] = {"threads": int(THREADS), "resolution": 64}
    result |= {method: before[method] for method in CASES if method in before}
    for method in os.environ.get("METHODS", ",".join(CASES)).split(","):
        settings = f"BATCHES={','.join(map(str, BATCHES))} SLOTS={','.join(map(str, SLOTS))} STEPS={STEPS}"
        result[method] = {
            "repeat": f"METHODS={method} {settings} THREADS={THREADS} python benchmarks/packing.py",
            "machine": describe_machine(),
        }
        for batch in BATCHES:
            with tempfile.TemporaryDirectory(prefix="dreamfleet-packing-") as name:
                result[method][f"batch_{batch}"] = measure(method, batch, Path(name))
    write_result("packing", result, how="python benchmarks/packing.py")


if __name__ == "__main__":
    main()
