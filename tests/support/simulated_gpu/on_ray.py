"""Runs cases on a local Ray cluster with two simulated GPUs: ``python -m simulated_gpu.on_ray FOLDER CASE...``

Requires ``inject`` on PYTHONPATH and SIMULATED_GPUS=2, which the workers inherit. Prints a line of JSON per
case.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny

from dreamfleet.trainers.recipe import Recipe, build_recipe

WORD = {"name": "textual_inversion", "placeholder_token": "<thing>", "initializer_token": "cat"}


def recipe_of(folder: Path, name: str, **changes: Any) -> Recipe:
    """Return a recipe of two steps on GPUs."""
    options = {
        "output_dir": str(folder / "runs" / name),
        "train__max_train_steps": 2,
        "train__mixed_precision": "bf16",
        "scaling": {"num_workers": 2, "use_gpu": True, "max_failures": 0},
        "validation": {"holdout": str(folder / "held"), "holdout_timesteps": 1, "steps": 1},
    }
    return build_recipe(tiny.make_recipe(folder, **{**options, **changes}))


def train(folder: Path, address: str, name: str, **scaling: Any) -> None:
    """Train on two workers, and check their devices in the summary."""
    from dreamfleet.trainers.launch import fit

    scaling = {"num_workers": 2, "use_gpu": True, "max_failures": 0, **scaling}
    found = fit(recipe_of(folder, name, scaling=scaling), address=address, on_progress=lambda line: None)
    assert (found.summary.steps, found.summary.workers) == (2, 2)
    assert found.summary.device == "Simulated GPU", found.summary.device


def train_on_two(folder: Path, address: str) -> None:
    """Train on two workers with a GPU each."""
    train(folder, address, "two")


def train_on_halves(folder: Path, address: str) -> None:
    """Train on two workers that share a GPU, which NCCL does not support."""
    train(
        folder,
        address,
        "halves",
        resources_per_worker={"CPU": 1, "GPU": 0.5},
        placement_strategy="STRICT_PACK",
    )


def cache(folder: Path, address: str) -> None:
    """Encode with two actors, each on a separate GPU."""
    from dreamfleet.trainers.driver.build_cache import cache_latents

    made = cache_latents(recipe_of(folder, "cache", data__cache_dir=str(folder / "cache")), address=address)
    assert made.encoded == 6 and not made.left_out


def search(folder: Path, address: str) -> None:
    """Search with half a GPU per trial; one trial fails."""
    from dreamfleet.tune.search import search as search_for

    rates = {"distribution": "choice", "values": [1e-3, 1e38]}
    section = {
        "algorithm": "grid",
        "scheduler": "none",
        "space": {"optimizer.learning_rate": rates},
        "resources_per_trial": {"CPU": 1, "GPU": 0.5},
    }
    recipe = recipe_of(folder, "search", method=WORD, search=section)
    found = search_for(recipe, address=address, on_progress=lambda trial: None)
    assert sorted(trial.status for trial in found.trials) == ["completed", "failed"], found.trials


#: Name -> function of a folder and the cluster's address.
CASES: dict[str, Callable[[Path, str], None]] = {
    "ray-train": train_on_two,
    "ray-train-on-halves": train_on_halves,
    "ray-cache": cache,
    "ray-search": search,
}


def main() -> None:
    """Run the named cases."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    folder = Path(sys.argv[1])
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 4, "num_gpus": 2, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        for name in sys.argv[2:]:
            result: dict[str, Any] = {"case": name, "error": None}
            try:
                CASES[name](folder, cluster.address)
            except Exception:  # noqa: BLE001 - reported in the output
                result["error"] = traceback.format_exc(limit=-8)
            print(json.dumps(result), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
