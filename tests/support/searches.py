"""Recipes of searches, trials with artificial results, and search folders for tests."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import tiny
from PIL import Image

from dreamfleet.trainers.recipe import Recipe, build_recipe
from dreamfleet.tune.trial_store import Trial, TrialStore

# Learning rates of trials that are trained; with the last one the loss soon becomes infinite or NaN.
GOOD, BAD, HOPELESS = 1e-3, 5.0, 1e38
RATES = {"distribution": "loguniform", "lower": 1e-4, "upper": 1e-1}
VECTORS = {"distribution": "choice", "values": [1, 2, 4]}


def make_tree(folder: Path | str = "runs/x", **section: Any) -> dict[str, Any]:
    space = {"optimizer.learning_rate": RATES, "method.num_vectors": VECTORS}
    return {
        "method": {"name": "textual_inversion", "placeholder_token": "<x>"},
        "data": {"instance_data_dir": "images"},
        "train": {"max_train_steps": 100},
        "validation": {"holdout": "holdout", "steps": 10},
        "scaling": {"num_workers": 2},
        "search": {"space": space, "num_trials": 6, **section},
        "output_dir": str(folder),
    }


def make_trained_tree(folder: Path, output_dir: str, rates: list[float], **section: Any) -> dict[str, Any]:
    space = {
        "optimizer.learning_rate": {"distribution": "choice", "values": rates},
        "method.num_vectors": {"distribution": "choice", "values": [1, 2]},
    }
    tree = tiny.make_recipe(
        folder,
        output_dir=output_dir,
        method={"name": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "cat"},
        data__instance_prompt=None,
        data__class_prompt=None,
        train__max_train_steps=40,
        train__checkpointing_steps=10,
        validation={
            "holdout": str(folder / "holdout"),
            "holdout_timesteps": 2,
            "steps": 10,
            "prompts": ["a <x>"],
            "num_images": 1,
            "num_inference_steps": 2,
        },
        scaling={"num_workers": 1, "use_gpu": False},
    )
    search = {
        "algorithm": "grid",
        "reduction_factor": 2,
        "grace_period": 10,
        "max_concurrent_trials": 2,
        "space": space,
        **section,
    }
    return {**tree, "search": search}


def make_trained_recipe(folder: Path, name: str, rates: list[float], **section: Any) -> Recipe:
    return build_recipe(make_trained_tree(folder, str(folder / name), rates, **section))


def make_recipe(folder: Path | str = "runs/x", **section: Any) -> Recipe:
    return build_recipe(make_tree(folder, **section))


def make_recipe_of_two_metrics(folder: Path | str) -> Recipe:
    """Return a recipe of a search by held-out loss and CLIP-I."""
    tree = make_tree(folder, metric=["holdout_loss", "clip_i"])
    tree["validation"] |= {"prompts": ["a <x>"], "metrics": ["loss", "clip_i"]}
    return build_recipe(tree)


def loss_at(point: dict[str, Any]) -> float:
    """Return an artificial loss of a point, with the minimum at learning rate 2e-3 and two vectors."""
    return abs(point["optimizer.learning_rate"] / 2e-3 - 1) + abs(point["method.num_vectors"] - 2)


def make_trials(metric: str = "holdout_loss") -> list[Trial]:
    def trial(number: int, rate: float, vectors: int, status: str, values: list[float]) -> Trial:
        rounds = [{"step": 10 * k, metric: value} for k, value in enumerate(values)]
        point = {"optimizer.learning_rate": rate, "method.num_vectors": vectors}
        return Trial(f"trial-{number:03d}", point, status, rounds, 3.5)

    failed = trial(4, 9e-2, 1, "failed", [])
    failed.error = "the loss is <no> number"
    return [
        trial(0, 1e-3, 1, "completed", [0.9, 0.5, 0.4]),
        trial(1, 2e-3, 2, "completed", [0.9, 0.4, 0.3]),
        trial(2, 5e-2, 4, "stopped", [0.9, 0.6]),
        trial(3, 2e-4, 4, "interrupted", [0.9]),
        failed,
    ]


def make_searched_folder(folder: Path, **section: Any) -> TrialStore:
    store = TrialStore(make_recipe(folder, **section), make_trials())
    for number, trial in enumerate(store.trials[:4]):
        samples = folder / trial.folder / "samples"
        samples.mkdir(parents=True)
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(samples / "step-000020.png")
        cell = {"prompt": "a <x>", "seed": 0, "row": 0, "column": 0, "width": 16, "height": 16}
        (samples / "step-000020.jsonl").write_text(json.dumps(cell))
    return store


def make_many_trials(count: int, *, seed: int = 0) -> list[Trial]:
    """Return trials at random points of make_recipe's space; the learning rate decides the loss, the vectors do not.

    The loss is best at 3e-3. CLIP-I prefers higher rates, so that the two metrics disagree.
    """
    draw = random.Random(seed)
    trials = []
    for number in range(count):
        exponent = draw.uniform(-4, -1)
        point = {"optimizer.learning_rate": 10**exponent, "method.num_vectors": draw.choice([1, 2, 4])}
        distance = (exponent - math.log10(3e-3)) ** 2
        last = 100 if distance < 0.5 else 20
        rounds = [
            {
                "step": step,
                "holdout_loss": 0.4 + 0.1 * distance + 0.1 * (1 - step / 100) + draw.gauss(0, 0.002),
                "clip_i": 0.6 + 0.1 * exponent + draw.gauss(0, 0.002),
            }
            for step in range(0, last + 1, 20)
        ]
        status = "completed" if last == 100 else "stopped"
        trials.append(Trial(f"trial-{number:03d}", point, status, rounds, seconds=last / 10))
    return trials
