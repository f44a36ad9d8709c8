"""Measures packed trainings on a GPU: steps per second of K trainings that share SD 1.5, against one training alone.

The model has SD 1.5's architecture and random weights; batches are synthetic latents of 512 px images. Each method
trains alone, packed with K = 8, 16 and 32, and alone again, on the same loaded model. `weights_apart` is the largest
difference between the weights of the first training alone and in the pack after the same steps, in float32 and in bf16.

    python benchmarks/gpu_packing.py [--methods ti,lora] [--slots 8,16,32] [--steps 12] [--small]
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_cases import GIB, random_model, synthetic_batch, write_configs
from measure import write_result

WORD = {"placeholder_token": "<thing>", "initializer_token": "toy"}
METHODS: dict[str, dict[str, Any]] = {
    "ti": {"name": "textual_inversion", "num_vectors": 4, **WORD},
    "lora": {"name": "dreambooth", "lora_rank": 16},
    "hypernetwork": {"name": "hypernetwork"},
    "apt": {"name": "prompt_tuning", **WORD},
}
WARM_UP = 3


def recipe_of(method: str, folder: Path, seed: int, *, precision: str, small: bool) -> Any:
    """Return the recipe of one training."""
    from dreamfleet.trainers.recipe import build_recipe

    model = write_configs("sd1", folder / "sd1", small=small)
    return build_recipe(
        {
            "method": METHODS[method],
            "model": {"pretrained_model_name_or_path": str(model)},
            "data": {
                "instance_data_dir": str(folder),
                "instance_prompt": "a sks dog",
                "resolution": 64 if small else 512,
            },
            "train": {
                "train_batch_size": 1,
                "mixed_precision": precision,
                "max_train_steps": 1,
                "seed": seed,
            },
            "engine": {"zero_stage": "auto"},
            "scaling": {"num_workers": 0},
            "output_dir": str(folder / "run"),
        }
    )


class Trainings:
    """K trainings of one method on copies of one model, each with its own optimizer and batch."""

    def __init__(self, recipes: list[Any], base: Any, device: torch.device):
        self.device = device
        self.engines, self.batches = [], []
        for recipe in recipes:
            engine, batch = build_training(recipe, base.share(), device)
            self.engines.append(engine)
            self.batches.append(batch)

    def run(self, backward: Any, steps: int) -> tuple[float, int]:
        """Train some steps; return the seconds per step of all trainings after the first ones, and the peak memory."""
        from dreamfleet.trainers.loop import Hooks, Schedule, train

        total = steps + WARM_UP
        trainings: list[Any] = [
            train(
                engine,
                itertools.repeat(batch),
                lambda ready: dict(ready),
                rates={group.name: lambda step: 1e-4 for group in engine.groups},
                schedule=Schedule(total=total, save_every=10**9, sample_every=10**9, log_every=10**9),
                seed=number,
                hooks=Hooks(),
            )
            for number, (engine, batch) in enumerate(zip(self.engines, self.batches, strict=True))
        ]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        micros = [next(training) for training in trainings]
        stamps = []
        for number in range(total + 1):  # the rehearsal comes first
            losses = backward(micros)
            if number < total:
                micros = [one.send(loss) for one, loss in zip(trainings, losses, strict=True)]
            if number in (WARM_UP, total):
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                stamps.append(time.perf_counter())
        for training, loss in zip(trainings, losses, strict=True):
            finish(training, loss)
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return (stamps[1] - stamps[0]) / steps, peak

    def weights(self, number: int) -> dict[str, torch.Tensor]:
        """Return copies of the weights of one training."""
        return {name: tensor.clone() for name, tensor in self.engines[number].weights().items()}


def finish(training: Iterator[Any], loss: Any) -> None:
    """Send the last loss to a training, which ends it."""
    try:
        training.send(loss)  # type: ignore[attr-defined]
    except StopIteration:
        return
    raise AssertionError("the training asks for another pass after its last step")


def build_training(recipe: Any, model: Any, device: torch.device) -> tuple[Any, Any]:
    """Return the engine of a training on a model, and a batch in host memory."""
    from dreamfleet.trainers.engines.base import DTYPES, engine_class
    from dreamfleet.trainers.methods.build import build_method

    torch.manual_seed(recipe.train.seed)
    method = build_method(recipe, model, concepts=())
    kind, precision = engine_class(recipe.engine), recipe.train.mixed_precision
    half = DTYPES[precision] if device.type == "cuda" else None
    kind.place_model(method, recipe.engine, device=device, dtype=half)
    engine = kind(
        method,
        config=recipe.engine,
        optimizer=recipe.optimizer,
        mixed_precision=precision,
        device=device,
        seed=recipe.train.seed,
    )
    return engine, synthetic_batch(recipe, method)


def alone(micros: list[Any]) -> list[Any]:
    """Run the pass of each training by itself."""
    for micro in micros:
        if micro.seed is not None:
            torch.manual_seed(micro.seed)
    return [micro.engine.backward(micro.batch, last=micro.last) for micro in micros]


def make_base(*, small: bool) -> Any:
    """Return the model that all trainings of one precision share."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of("ti", Path(folder), 0, precision="no", small=small)
        return random_model(recipe, recipe.method.name)


def measure(
    method: str, slots: list[int], base: Any, *, steps: int, precision: str, small: bool, device: torch.device
) -> dict[str, Any]:
    """Measure one method in one precision."""
    from dreamfleet.trainers.packing.pack import Pack

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        recipes = [
            recipe_of(method, Path(folder), seed, precision=precision, small=small)
            for seed in range(max(slots))
        ]
        before = Trainings(recipes[:1], base, device)
        seconds, peak = before.run(alone, steps)
        weights = before.weights(0)
        found["alone"] = {"seconds_per_step": round(seconds, 4), "peak_gib": round(peak / GIB, 2)}
        del before
        for num in slots:
            packed = Trainings(recipes[:num], base, device)
            pack = Pack(base.share())
            together, peak = packed.run(pack.backward, steps)
            apart = max(
                float((packed.weights(0)[name] - tensor).abs().max()) for name, tensor in weights.items()
            )
            found[str(num)] = {
                "seconds_per_step_of_all": round(together, 4),
                "peak_gib": round(peak / GIB, 2),
                "ratio": round(num * seconds / together, 2),
                "weights_apart": apart,
                "trainings_in_one_pass": pack.limit or num,
            }
            print(json.dumps({method: {precision: {num: found[str(num)]}}}), flush=True)
            del packed, pack
            if device.type == "cuda":
                torch.cuda.empty_cache()
        again, _ = Trainings(recipes[:1], base, device).run(alone, steps)
        found["alone"]["seconds_per_step_again"] = round(again, 4)
        found["alone"]["weights_largest"] = max(float(tensor.abs().max()) for tensor in weights.values())
    return found


def main() -> None:
    """Measure the methods, and write each result immediately."""
    from dreamfleet.trainers.distributed.device import best_device

    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--slots", default="8,16,32")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    slots, device = [int(num) for num in asked.slots.split(",")], best_device()
    results: dict[str, Any] = {}
    every = {"bf16": slots, "no": slots[:1]} if device.type == "cuda" else {"no": slots}
    options: dict[str, Any] = {"steps": asked.steps, "small": asked.small, "device": device}
    for precision, chosen in every.items():
        base = make_base(small=asked.small)
        for method in asked.methods.split(","):
            found = measure(method, chosen, base, precision=precision, **options)
            results.setdefault(method, {})[precision] = found
            if asked.small:
                print(json.dumps({method: found}, indent=1), flush=True)
            else:
                how = f"python benchmarks/gpu_packing.py --methods {asked.methods} --slots {asked.slots}"
                write_result("gpu_packing", {"methods": results}, how=how)


if __name__ == "__main__":
    main()
