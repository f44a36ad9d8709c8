"""Counts the trials that a search needs to come near a planted optimum, with TPE and with random search.

The objective is a function of the point in the place of a training: |log2(rate / 2e-3)| + 0.5 |vectors - 2|, over
learning rates from 1e-5 to 1e-1 and 1 to 8 vectors. Found: the vectors are 2 and the rate is within a factor of 1.5.
Environment variables: SEEDS, TRIALS.
"""

from __future__ import annotations

import math
import os
import statistics
from pathlib import Path
from typing import Any

from measure import write_result

from dreamfleet.trainers.recipe import load_recipe
from dreamfleet.tune.algorithm import SearchAlgorithm
from dreamfleet.tune.trial_store import TrialStore

ROOT = Path(__file__).parent.parent
SEEDS, TRIALS = (int(os.environ.get(name, n)) for name, n in (("SEEDS", 20), ("TRIALS", 60)))
SPACE = (
    "{optimizer.learning_rate: {distribution: loguniform, lower: 1.0e-5, upper: 1.0e-1}, "
    "method.num_vectors: {distribution: randint, lower: 1, upper: 8}}"
)
RATE, VECTORS, FACTOR = "optimizer.learning_rate", "method.num_vectors", 1.5


def objective(point: dict[str, Any]) -> float:
    """Return the planted loss of a point."""
    return abs(math.log2(point[RATE] / 2e-3)) + 0.5 * abs(point[VECTORS] - 2)


def trials_needed(algorithm: str, seed: int) -> int | None:
    """Return the number of trials until a point is near the optimum; None if none of TRIALS is."""
    recipe = load_recipe(
        ROOT / "recipes/cat-search.yaml",
        [
            f"search.algorithm={algorithm}",
            "search.scheduler=none",
            f"search.num_trials={TRIALS}",
            f"search.seed={seed}",
            f"search.space={SPACE}",
        ],
    )
    store = TrialStore(recipe, [])
    suggest = SearchAlgorithm(store).suggest
    while (trial := suggest()) is not None:
        trial.add_round({"step": 100, "holdout_loss": objective(trial.point)})
        trial.status = "completed"
        if trial.point[VECTORS] == 2 and abs(math.log(trial.point[RATE] / 2e-3)) <= math.log(FACTOR):
            return len(store.trials)
    return None


def main() -> None:
    """Search with both algorithms for every seed, and write the result."""
    found: dict[str, Any] = {}
    for algorithm in ("optuna", "random"):
        needed = [trials_needed(algorithm, seed) for seed in range(SEEDS)]
        successes = [count for count in needed if count is not None]
        found[algorithm] = {
            "found": len(successes),
            "of": SEEDS,
            "median_trials": statistics.median(successes) if successes else None,
            "trials": needed,
        }
        print(algorithm, found[algorithm], flush=True)
    write_result("planted", {"budget": TRIALS, **found}, how="python benchmarks/planted.py")


if __name__ == "__main__":
    main()
