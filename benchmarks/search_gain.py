"""Measures what a search brings on the shipped cat: against the default recipe, against random search, and packed.

Textual Inversion, learning rate and number of vectors, held-out loss. For each seed (of images' order, noise and
proposals): TPE with ASHA, the same with as many steps as random search trains, random search and TPE without ASHA, and
the recipe's own values. Losses and trained steps do not depend on the machine. The first seed is repeated with one
slot, which gives the trials per hour packed and not. Environment variables: SEEDS, TRIALS, STEPS; with PACKED=n only
the last comparison is made, n times in turns, and written as search_packed.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import write_result

ROOT = Path(__file__).parent.parent
SEEDS, TRIALS, STEPS = (
    int(os.environ.get(name, n)) for name, n in (("SEEDS", 5), ("TRIALS", 16), ("STEPS", 120))
)
ROUNDS = 8  # validation rounds of a trial
BASE = (
    "train.train_batch_size=1",
    f"train.max_train_steps={STEPS}",
    f"train.checkpointing_steps={STEPS}",
    "train.export=false",
    f"validation.steps={STEPS // ROUNDS}",
    "validation.prompts=[]",
    "validation.metrics=[loss]",
    "validation.holdout_timesteps=4",
    "report_to=[]",
    "scaling.num_workers=0",
)
EQUAL = round(TRIALS / 0.6)  # trials that ASHA trains within the steps of TRIALS whole ones
ASHA = ("search.algorithm=optuna", "search.scheduler=asha")
WAYS = {
    "tpe_asha": ASHA,
    "tpe_asha_equal_steps": (*ASHA, f"search.num_trials={EQUAL}"),
    "random": ("search.algorithm=random", "search.scheduler=none"),
    "tpe": ("search.algorithm=optuna", "search.scheduler=none"),
}


def run_search(folder: Path, way: str, seed: int, *, slots: int = 8) -> dict[str, Any]:
    """Run one search; return its best value and point, the steps of all trials, and its seconds."""
    from dreamfleet.tune.search import search

    start = time.perf_counter()
    found = search(
        ROOT / "recipes/cat-search.yaml",
        overrides=[
            *BASE,
            f"search.num_trials={TRIALS}",
            *WAYS[way],
            "search.max_concurrent_trials=null",
            f"search.seed={seed}",
            f"train.seed={seed}",
            f"scaling.slots_per_worker={slots}",
            f"output_dir={folder}",
        ],
        on_progress=lambda trial: None,
    )
    assert found.best is not None
    return {
        "best": found.best.figure("holdout_loss"),
        "point": found.best.point,
        "trials": len(found.trials),
        "steps": sum(trial.steps for trial in found.trials),
        "seconds": round(time.perf_counter() - start, 1),
    }


def compare_packed(scratch: Path, rounds: int) -> dict[str, Any]:
    """Run the same random search with 8 slots and with one, in turns; return seconds of each and their ratios.

    CPU seconds are also those of child processes: other programs on the machine change them less than wall time.
    """
    turns: list[dict[str, Any]] = []
    for number in range(rounds):
        turn: dict[str, Any] = {}
        for name, slots in (("packed", 8), ("one_slot", 1)):
            before = sum(os.times()[:4])
            found = run_search(scratch / f"{name}-{number}", "random", 0, slots=slots)
            cpu = round(sum(os.times()[:4]) - before, 1)
            turn[name] = {key: found[key] for key in ("best", "trials", "steps", "seconds")} | {"cpu": cpu}
        for key in ("seconds", "cpu"):
            turn[f"ratio_{key}"] = round(turn["one_slot"][key] / turn["packed"][key], 2)
        turns.append(turn)
    return {"trials": TRIALS, "steps": STEPS, "turns": turns}


def run_default(folder: Path, seed: int) -> float:
    """Train the recipe's own values; return the lowest held-out loss of its rounds."""
    from dreamfleet.datasets.storage.storage import Storage
    from dreamfleet.trainers.recipe import load_recipe
    from dreamfleet.trainers.report.metrics_log import read_metrics
    from dreamfleet.trainers.run.run import run_worker

    recipe = load_recipe(
        ROOT / "recipes/cat-search.yaml", [*BASE, f"train.seed={seed}", f"output_dir={folder}"]
    )
    run_worker(recipe)
    lines = read_metrics(Storage(str(folder)))
    return min(line["holdout_loss"] for line in lines if line["step"] and "holdout_loss" in line)


def main() -> None:
    """Run every search of every seed, and write the result after each seed."""
    seeds: dict[str, dict[str, Any]] = {}
    if rounds := int(os.environ.get("PACKED", 0)):
        with tempfile.TemporaryDirectory() as scratch:
            run_search(Path(scratch, "first"), "random", 1)  # imports and reads the model, which do not count
            found = compare_packed(Path(scratch), rounds)
        write_result("search_packed", found, how="PACKED=3 python benchmarks/search_gain.py")
        return
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(SEEDS):
            folder = Path(scratch, str(seed))
            found: dict[str, Any] = {way: run_search(folder / way, way, seed) for way in WAYS}
            found["default"] = run_default(folder / "default", seed)
            if seed == 0:
                alone = run_search(folder / "one-slot", "random", seed, slots=1)
                packed = found["random"]
                found["one_slot"] = alone
                found["trials_per_hour"] = {
                    "packed": round(3600 * packed["trials"] / packed["seconds"]),
                    "one_slot": round(3600 * alone["trials"] / alone["seconds"]),
                    "ratio": round(alone["seconds"] / packed["seconds"], 2),
                }
            seeds[str(seed)] = found
            write_result(
                "search_gain", {"seeds": seeds, **summarise(seeds)}, how="python benchmarks/search_gain.py"
            )


def summarise(seeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return in how many seeds the search is better, and what ASHA saves."""
    every = list(seeds.values())

    def wins(way: str, other: str) -> int:
        best = [one[other] if other == "default" else one[other]["best"] for one in every]
        return sum(one[way]["best"] < against for one, against in zip(every, best, strict=True))

    return {
        "better_than": {way: {other: wins(way, other) for other in ("default", "random")} for way in WAYS},
        "steps_over_random": {
            way: round(
                sum(one[way]["steps"] for one in every) / sum(one["random"]["steps"] for one in every), 3
            )
            for way in WAYS
        },
        "loss_of_asha_minus_none": [round(one["tpe_asha"]["best"] - one["tpe"]["best"], 5) for one in every],
        "of": len(every),
    }


if __name__ == "__main__":
    main()
