"""Where do signals from the training images alone turn, compared with the loss on held-out images?

Trains the example cat long past the best step with several methods and seeds. Every round measures the held-out loss
and the metrics ``overfitting``, ``view_loss`` and ``fidelity``. Each signal chooses a step: the one where it is best
(``overfitting`` rises from the start, so it chooses the first round whose value reaches a threshold, the best one over
all runs in hindsight). ``regret`` is how much higher the held-out loss is at that step than at its own minimum.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import spread, write_result

ROOT = Path(__file__).resolve().parents[1]
CONSTANT = ("optimizer.lr_scheduler=constant", "optimizer.lr_warmup_steps=0")
DREAMBOOTH = ("recipes/demo.yaml", "method.with_prior_preservation=false", *CONSTANT)
LORA = ("recipes/cat-lora.yaml", "method.with_prior_preservation=false", *CONSTANT)
INVERSION = ("recipes/cat-textual-inversion.yaml", "method.num_vectors=4", "optimizer.learning_rate=4.0e-3")
#: name -> recipe and overrides, steps, and steps between rounds
CASES: dict[str, tuple[tuple[str, ...], int, int]] = {
    "dreambooth": ((*DREAMBOOTH, "optimizer.learning_rate=2.0e-4"), 100, 5),
    "dreambooth-slow": ((*DREAMBOOTH, "optimizer.learning_rate=3.0e-5"), 400, 20),
    "lora": ((*LORA, "optimizer.learning_rate=1.0e-3"), 200, 10),
    "textual-inversion": (INVERSION, 400, 20),
}
Curve = dict[int, dict[str, float]]  # step -> figures
SIGNALS = ("view_loss", "fidelity")
THRESHOLDS = [number / 50 for number in range(5, 45)]


def train_one(case: str, seed: int, folder: Path, *, previews: bool) -> Curve:
    """Train a case with a seed; return the figures of every round after the first step."""
    from dreamfleet.trainers.launch import fit

    (recipe, *overrides), steps, every = CASES[case]
    out = folder / f"{case}-{seed}"
    metrics = "[loss, overfitting, view_loss, fidelity]" if previews else "[loss, overfitting, view_loss]"
    options = [
        f"output_dir={out}",
        f"train.max_train_steps={steps}",
        f"train.seed={seed}",
        f"train.checkpointing_steps={steps}",
        "train.export_formats=[]",
        f"validation.steps={every}",
        f"validation.metrics={metrics}",
        "validation.num_images=2",
        "validation.num_inference_steps=12",
        "scaling.num_workers=0",
        "report_to=[]",
    ]
    fit(ROOT / recipe, overrides=[*overrides, *options, *([] if previews else ["validation.prompts=[]"])])
    curve: Curve = {}
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        if "loss" not in line:
            curve.setdefault(line["step"], {}).update(line)
    return {step: figures for step, figures in curve.items() if step}


def regret(curve: Curve, step: int) -> float:
    """Return the held-out loss at a step relative to its minimum over the run, minus 1."""
    return curve[step]["holdout_loss"] / min(figures["holdout_loss"] for figures in curve.values()) - 1


def best_step(curve: Curve, name: str) -> int:
    """Return the step at which a figure is best."""
    sign = -1 if name.startswith("fidelity") else 1
    return min(curve, key=lambda step: sign * curve[step][name])


def step_at(curve: Curve, threshold: float) -> int:
    """Return the first step whose ``overfitting`` reaches a threshold, or the last step."""
    return next((step for step, each in curve.items() if each["overfitting"] >= threshold), max(curve))


def mean(values: list[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def summarise(curves: dict[str, dict[int, Curve]]) -> dict[str, Any]:
    """Return where each signal turns and its regret, for each case and over all runs."""
    every = [curve for runs in curves.values() for curve in runs.values()]
    threshold = min(
        THRESHOLDS, key=lambda each: mean([regret(curve, step_at(curve, each)) for curve in every])
    )
    choices: dict[str, Callable[[Curve], int]] = {
        "holdout_loss": lambda curve: best_step(curve, "holdout_loss"),
        "overfitting": lambda curve: step_at(curve, threshold),
        "last step": max,
    }
    for name in SIGNALS:
        if all(name in figures for curve in every for figures in curve.values()):
            choices[name] = lambda curve, name=name: best_step(curve, name)  # type: ignore[misc]
    result: dict[str, Any] = {"overfitting_threshold": threshold, "cases": {}}
    for case, runs in curves.items():
        result["cases"][case] = {
            signal: {
                "steps": [choose(curve) for curve in runs.values()],
                "regret": spread([round(regret(curve, choose(curve)), 4) for curve in runs.values()]),
            }
            for signal, choose in choices.items()
        }
    result["regret_over_all_runs"] = {
        signal: spread([round(regret(curve, choose(curve)), 4) for curve in every])
        for signal, choose in choices.items()
    }
    return result


def main() -> None:
    """Train every case with every seed, and write what each signal chooses and the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES), help="cases to train, separated by commas")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each case")
    parser.add_argument("--no-previews", action="store_true", help="leave out fidelity, which takes longest")
    options = parser.parse_args()
    curves: dict[str, dict[int, Curve]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in options.cases.split(","):
            for seed in range(options.seeds):
                curve = train_one(case, seed, Path(folder), previews=not options.no_previews)
                curves.setdefault(case, {})[seed] = curve
                print(
                    case,
                    seed,
                    {name: best_step(curve, name) for name in ("holdout_loss", "view_loss")},
                    flush=True,
                )
    rounded = {
        case: {
            str(seed): {
                str(step): {name: round(value, 5) for name, value in figures.items() if name != "step"}
                for step, figures in curve.items()
            }
            for seed, curve in runs.items()
        }
        for case, runs in curves.items()
    }
    how = f"python benchmarks/overfitting.py --cases {options.cases} --seeds {options.seeds}"
    how += " --no-previews" if options.no_previews else ""
    write_result("overfitting", {**summarise(curves), "curves": rounded}, how=how)


if __name__ == "__main__":
    main()
