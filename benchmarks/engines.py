"""Compares the losses and seconds per step of every engine with those of torch, on the pocket model.

Two workers on one local Ray train the same steps: DreamBooth of U-Net and text encoder under every ZeRO stage
and offload, then Textual Inversion on a frozen model, which only stage 3 shards. On a CPU this shows that the
losses are equal, and the overhead of each engine. It cannot show memory savings or PCIe transfers, so the
bytes are those that `dreamfleet plan` estimates for GPUs. NVMe is skipped if libaio is missing.

    python benchmarks/engines.py [--steps 12]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from measure import write_result

ROOT = Path(__file__).parent.parent
WORD = {
    "name": "textual_inversion",
    "placeholder_token": "<cat>",
    "initializer_token": "cat",
    "num_vectors": 2,
}


def overrides(steps: int) -> list[str]:
    """Return the recipe overrides of every run: few steps, a logged loss at each step, no previews."""
    return [
        f"train.max_train_steps={steps}",
        "train.log_steps=1",
        f"train.checkpointing_steps={steps}",
        "train.export_formats=[]",
        "optimizer.lr_warmup_steps=0",
        # With the recipe's learning rates the pocket model amplifies rounding differences to a factor of two.
        "optimizer.learning_rate=1e-5",
        "optimizer.text_encoder_lr=1e-6",
        "validation.prompts=[]",
        "validation.metrics=[loss]",
        f"validation.steps={steps}",
        "report_to=[]",
        "engine.offload_optimizer_device=none",
        "engine.zero_stage=auto",
    ]


def run_engine(method: str, settings: dict[str, Any], folder: Path, steps: int) -> dict[str, Any]:
    """Train with one engine; return losses, held-out loss, seconds per step, and the estimated bytes for two GPUs."""
    from dreamfleet.datasets.storage.storage import Storage
    from dreamfleet.trainers.launch import fit
    from dreamfleet.trainers.memory.plan import plan_memory
    from dreamfleet.trainers.recipe import load_recipe
    from dreamfleet.trainers.report.metrics_log import read_metrics

    changes = [f"{key}={value}" for key, value in settings.items()]
    if "nvme" in settings.values():
        changes.append(f"engine.nvme_path={folder}/nvme")
    if method == "word":
        changes += [f"method={WORD}", "data.instance_prompt=null", "optimizer.learning_rate=5e-3"]
    recipe = load_recipe(
        ROOT / "recipes/cat-dreambooth-zero.yaml",
        [*overrides(steps), *changes, f"output_dir={folder}/{len(list(folder.iterdir()))}"],
    )
    fit(recipe)
    lines = read_metrics(Storage(recipe.output_dir))
    found = plan_memory(recipe).estimates
    mine = [one for one in found if one.choice.settings == ({"engine.zero_stage": "auto"} | settings)]
    held = {}
    if mine:
        gpu = {name: size for name, size in mine[0].gpu.items() if name not in ("context", "workspace")}
        host = sum(size for name, size in mine[0].host.items() if name != "process")
        held = {
            "planned_gpu_mib": round(sum(gpu.values()) / 2**20, 2),
            "planned_host_mib": round(host / 2**20, 2),
        }
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "holdout_loss": [line["holdout_loss"] for line in lines if "holdout_loss" in line][-1],
        # The first steps fill caches and record the order of DeepSpeed's layers.
        "seconds_a_step": statistics.median(
            [line["step_seconds"] for line in lines if "step_seconds" in line][3:]
        ),
        **held,
    }


def compare(runs: dict[str, dict[str, Any]]) -> None:
    """Add to each run the relative difference of its losses and the ratio of its seconds to those of torch."""
    plain = runs["torch"]
    for run in runs.values():
        pairs = zip(run["losses"], plain["losses"], strict=True)
        run["largest_relative_difference"] = max(abs(ours / theirs - 1) for ours, theirs in pairs)
        run["seconds_over_torch"] = round(run["seconds_a_step"] / plain["seconds_a_step"], 2)
        run["losses"] = [round(loss, 6) for loss in run["losses"]]


def main() -> None:
    """Run every engine on one local Ray, and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
    from deepspeed.ops.op_builder import AsyncIOBuilder

    from dreamfleet.trainers.driver.session import ray_session
    from dreamfleet.trainers.memory.strategies import CHOICES, NVME_CHOICES

    swaps = NVME_CHOICES if AsyncIOBuilder().is_compatible() else ()
    cases = {
        "dreambooth": [*CHOICES, *swaps],
        "word": [one for one in CHOICES if one.zero_stage in (None, 3)],
    }
    results: dict[str, Any] = {"steps": steps, "workers": 2, "precision": "no"}
    with tempfile.TemporaryDirectory() as name, ray_session(None, preload=("ray.train.torch",)):
        for method, choices in cases.items():
            results[method] = {
                one.name: run_engine(method, dict(one.settings), Path(name), steps) for one in choices
            }
            compare(results[method])
    write_result("engines", results, how=f"python benchmarks/engines.py --steps {steps}")


if __name__ == "__main__":
    main()
