"""Held-out loss of the example cat over steps with every optimizer, against the default recipe's AdamW.

Trains the shipped cat on the pocket model without prior preservation: as a LoRA, and DreamBooth of the whole U-Net.
AdamW has the recipe's learning rate and schedule. Prodigy has ``learning_rate: 1``, once with a constant rate and once
with the recipe's schedule; the others have rates that are usual relative to AdamW's, which were not tuned. Muon, which
this script registers, steps matrices and kernels of the U-Net by orthogonalised momenta, and vectors by AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import write_result
from torch import Tensor

from dreamfleet.trainers.config.builtin_optimizers import AdamOptions
from dreamfleet.trainers.config.optimizers import OPTIMIZERS, Optimizer
from dreamfleet.trainers.optim.weight_optimizer import WeightOptimizer

ROOT = Path(__file__).resolve().parents[1]
#: Recipe and learning rate of AdamW, by the name in the results.
RECIPES: dict[str, tuple[str, float]] = {"lora": ("cat-lora", 1e-3), "dreambooth": ("demo", 2e-4)}
CONSTANT = ("optimizer.lr_scheduler=constant", "optimizer.lr_warmup_steps=0")
CAREFUL = ("optimizer.options.safeguard_warmup=true", "optimizer.options.use_bias_correction=true")
#: Case -> optimizer, its learning rate (None: AdamW's times the factor), the factor, further overrides.
CASES: dict[str, tuple[str, float | None, float, tuple[str, ...]]] = {
    "adamw": ("adamw", None, 1, ()),
    "prodigy, constant": ("prodigy", 1.0, 1, CONSTANT),
    "prodigy, the recipe's schedule": ("prodigy", 1.0, 1, CAREFUL),
    "prodigy_schedulefree": ("prodigy_schedulefree", 1.0, 1, CONSTANT),
    "adamw_schedulefree": ("adamw_schedulefree", None, 1, CONSTANT),
    "lion": ("lion", None, 0.1, ()),
    "came": ("came", None, 0.2, ()),
    "adafactor": ("adafactor", None, 1, ()),
    "muon": ("muon", None, 1, ()),
}


class Muon(WeightOptimizer):
    """Muon (Jordan et al. 2024) for matrices and kernels, with the update size of AdamW (arXiv 2502.16982)."""

    def __init__(self, params: Any, options: AdamOptions):
        super().__init__(params, {"lr": 0.0, **options.model_dump()})

    def new_state(self, param: Tensor) -> dict[str, Tensor]:
        names = ("exp_avg",) if param.dim() > 1 else ("exp_avg", "exp_avg_sq")
        return {name: torch.zeros_like(param, requires_grad=False) for name in names}

    def make_update(self, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        if gradient.dim() < 2:
            beta1, beta2 = group["betas"]
            steps = float(state["step"])
            mean = state["exp_avg"].lerp_(gradient, 1 - beta1) / (1 - beta1**steps)
            square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2) / (1 - beta2**steps)
            return mean / square.sqrt_().add_(group["eps"])
        momentum = state["exp_avg"].mul_(0.95).add_(gradient)
        matrix = gradient.add(momentum, alpha=0.95).flatten(1)
        return orthogonalise(matrix).mul_(0.2 * math.sqrt(max(matrix.shape))).view_as(gradient)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return a matrix ``[R, C]`` with singular values near 1 and the same singular vectors (Newton-Schulz)."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        product = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * product + 2.0315 * product @ product) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def overrides_of(recipe: str, case: str, seed: int, out: Path, *, steps: int) -> list[str]:
    """Return the overrides of a case's training into the folder ``out``."""
    optimizer, rate, factor, overrides = CASES[case]
    return [
        "method.with_prior_preservation=false",
        f"output_dir={out}",
        f"train.max_train_steps={steps}",
        f"train.seed={seed}",
        f"train.checkpointing_steps={steps}",
        "train.export_formats=[]",
        f"train.log_steps={steps // 10}",
        f"validation.steps={steps // 10}",
        "validation.metrics=[loss]",
        "validation.prompts=[]",
        "scaling.num_workers=0",
        "report_to=[]",
        f"optimizer.name={optimizer}",
        f"optimizer.learning_rate={RECIPES[recipe][1] * factor if rate is None else rate}",
        *overrides,
    ]


def train_one(recipe: str, case: str, seed: int, folder: Path, *, steps: int) -> dict[str, Any]:
    """Train a case; return its held-out losses by step, and its effective rate at each logged step."""
    from dreamfleet.trainers.launch import fit

    out = folder / f"{recipe}-{list(CASES).index(case)}-{seed}"
    options = overrides_of(recipe, case, seed, out, steps=steps)
    done = fit(ROOT / "recipes" / f"{RECIPES[recipe][0]}.yaml", overrides=options)
    assert done.summary.exit_reason == "completed", done.summary.exit_reason
    return read_run(out)


def read_run(folder: Path) -> dict[str, Any]:
    """Return a finished run's held-out losses by step, and its effective rate at each logged step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [line.get("effective_lr", line["lr"]) for line in lines if "lr" in line]
    return {
        "holdout_loss": {
            line["step"]: round(line["holdout_loss"], 5) for line in lines if "holdout_loss" in line
        },
        "effective_lr": [float(f"{next(iter(rate.values())):.3g}") for rate in rates],
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the best and the last held-out loss of a case, as means over the seeds, and the step of the best."""
    curves = [run["holdout_loss"] for run in runs]
    best = [min(curve, key=lambda step: curve[step]) for curve in curves]
    return {
        "best": round(sum(curve[step] for curve, step in zip(curves, best, strict=True)) / len(curves), 5),
        "best_step": best,
        "last": round(sum(curve[max(curve)] for curve in curves) / len(curves), 5),
    }


def main() -> None:
    """Train every case with every seed; write the held-out losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", default=",".join(RECIPES), help="of lora, dreambooth")
    parser.add_argument("--cases", default=";".join(CASES), help="separated by semicolons")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    asked = parser.parse_args()
    OPTIMIZERS.register("muon")(
        Optimizer("Muon", build=Muon, state_bytes=lambda shape, _: 4 * math.prod(shape), Options=AdamOptions)
    )
    result: dict[str, Any] = {"steps": asked.steps, "recipes": {}}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in asked.recipes.split(","):
            cases = result["recipes"][recipe] = {}
            for case in asked.cases.split(";"):
                runs = [
                    train_one(recipe, case, seed, Path(folder), steps=asked.steps)
                    for seed in range(asked.seeds)
                ]
                cases[case] = {**summarise(runs), "runs": runs}
                print(recipe, case, summarise(runs), flush=True)
    how = f"python benchmarks/optimizers.py --recipes {asked.recipes} --seeds {asked.seeds} --steps {asked.steps}"
    write_result("optimizers", result, how=how)


if __name__ == "__main__":
    main()
