"""Prodigy at ``learning_rate: 1`` on the shipped cat against the recipe's AdamW and a search of its learning rate.

A search has eight trials over the range that ``dreamfleet tune`` proposes for the method, by TPE without early ends,
and trains several trials at once. All have the same steps, images and held-out images, and three seeds (of order,
noise and proposals). Processor time is that of one process, so other work on the machine hardly counts; before anything
is timed, ten steps load what the first training needs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import RESULTS, write_result
from optimizers import RECIPES, ROOT, overrides_of, read_run, train_one

CASES = ("adamw", "prodigy, constant", "prodigy_schedulefree")
SEARCH = "search of adamw's rate"
TRIALS = 8


def run_search(recipe: str, seed: int, folder: Path, *, steps: int) -> dict[str, Any]:
    """Search the learning rate; return the best trial's held-out losses and rates, and its learning rate."""
    from dreamfleet.tune.search import search

    name, _ = RECIPES[recipe]
    found = search(
        ROOT / "recipes" / f"{name}.yaml",
        overrides=[
            *overrides_of(recipe, "adamw", seed, folder, steps=steps),
            "search.space={optimizer.learning_rate: " + str(default_range(recipe)) + "}",
            f"search.num_trials={TRIALS}",
            "search.algorithm=optuna",
            "search.scheduler=none",
            "search.metric=holdout_loss",
            f"search.seed={seed}",
            "scaling.slots_per_worker=8",
        ],
        on_progress=lambda trial: None,
    )
    assert found.best is not None and found.exit_reason == "completed"
    rate = found.best.point["optimizer.learning_rate"]
    rates = [trial.point["optimizer.learning_rate"] for trial in found.trials]
    return {
        **read_run(folder / "trials" / found.best.name),
        "best_rate": rate,
        "rates": rates,
    }


def default_range(recipe: str) -> dict[str, Any]:
    """Return the range of learning rates that a search of the recipe's method has by default."""
    from dreamfleet.trainers.recipe import load_recipe

    space = load_recipe(ROOT / "recipes" / f"{RECIPES[recipe][0]}.yaml").method.search_space
    return dict(space["optimizer.learning_rate"])


def timed(run: Any, *args: Any, **options: Any) -> dict[str, Any]:
    """Return what a training returns, with its processor and wall time in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found: dict[str, Any] = run(*args, **options)
    spent = {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall}
    return {**found, **{key: round(value, 1) for key, value in spent.items()}}


def summarise(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each case's best and last held-out losses by seed, and its time over the default's, as medians."""
    summary: dict[str, Any] = {}
    for case in seeds[0]:
        runs = [seed[case] for seed in seeds]
        curves = [run["holdout_loss"] for run in runs]
        best = [min(curve.values()) for curve in curves]
        last = [curve[max(curve, key=int)] for curve in curves]
        base = [min(seed["adamw"]["holdout_loss"].values()) for seed in seeds]
        summary[case] = {
            "best": best,
            "last": last,
            "median_best": statistics.median(best),
            "median_last": statistics.median(last),
            "best_over_default": [round(mine / other, 4) for mine, other in zip(best, base, strict=True)],
            "cpu_over_default": round(
                statistics.median(seed[case]["cpu_seconds"] / seed["adamw"]["cpu_seconds"] for seed in seeds),
                2,
            ),
            "wall_over_default": round(
                statistics.median(seed[case]["seconds"] / seed["adamw"]["seconds"] for seed in seeds), 2
            ),
        }
    return summary


def read_earlier(steps: int) -> dict[str, Any]:
    """Return the recipes of the result file if it has as many steps. Its keys that are steps are text."""
    path = RESULTS / "prodigy.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return dict(found["recipes"]) if found.get("steps") == steps else {}


def main() -> None:
    """Train every case and search with every seed; write the result after each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", default=",".join(RECIPES), help="of lora, dreambooth")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--resume", action="store_true", help="keep the seeds in the result file")
    asked = parser.parse_args()
    earlier = read_earlier(asked.steps) if asked.resume else {}
    how = (
        f"python benchmarks/prodigy.py --recipes {asked.recipes} --seeds {asked.seeds} --steps {asked.steps}"
    )
    result: dict[str, Any] = {"steps": asked.steps, "trials": TRIALS, "recipes": earlier}
    with tempfile.TemporaryDirectory() as scratch:
        train_one("lora", "adamw", 0, Path(scratch, "first"), steps=10)
        for recipe in asked.recipes.split(","):
            seeds = earlier.get(recipe, {}).get("seeds", [])[: asked.seeds]
            for seed in range(len(seeds), asked.seeds):
                folder = Path(scratch, f"{recipe}-{seed}")
                found = {
                    case: timed(train_one, recipe, case, seed, folder, steps=asked.steps) for case in CASES
                }
                print(recipe, seed, {case: found[case]["cpu_seconds"] for case in found}, flush=True)
                found[SEARCH] = timed(run_search, recipe, seed, folder / "search", steps=asked.steps)
                seeds.append(found)
                result["recipes"][recipe] = {**summarise(seeds), "seeds": seeds}
                write_result("prodigy", result, how=how)


if __name__ == "__main__":
    main()
