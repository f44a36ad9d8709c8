"""Compares whole runs on a GPU with the same runs on the CPU: loss curves, held-out loss, previews, exports, resume.

For one method, the command `dreamfleet train` runs the shipped cat's recipe on the pocket model: on the CPU in float32,
then on the GPU in float32, bf16 and fp16, and in bf16 once more, stopped half way and resumed. Noise and order of
images are the same on every device, so the curves differ by the precision alone.

    python benchmarks/gpu_curves.py lora [--steps 12] [--folder FOLDER] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECIPES = {
    "dreambooth": "demo.yaml",
    "lora": "cat-lora.yaml",
    "native": "cat-native.yaml",
    "textual-inversion": "cat-textual-inversion.yaml",
    "hypernetwork": "cat-hypernetwork.yaml",
    "prompt-tuning": "cat-prompt-tuning.yaml",
    "aesthetic": "cat-aesthetic.yaml",
    "discriminator": "cat-discriminator.yaml",
}
NO_PREVIEWS = ("discriminator",)
ONE_PASS = ("aesthetic",)  # its steps are the images, and nothing is resumed
PRECISIONS = ("no", "bf16", "fp16")
LIMIT = 150  # seconds for one run


def overrides(method: str, steps: int) -> list[str]:
    """Return the recipe overrides of every run: few steps, each one logged, small previews, one process."""
    changes = ["scaling.num_workers=0", "train.log_steps=1", "report_to=[]"]
    if method in ONE_PASS:
        changes += ["validation.num_images=1", "validation.num_inference_steps=4"]
        return changes
    changes += [f"train.max_train_steps={steps}", f"train.checkpointing_steps={steps // 2}"]
    changes += ["optimizer.lr_scheduler=constant", f"validation.steps={steps}"]
    if method == "native":
        changes += ["train.num_train_epochs=null", "train.save_every_n_epochs=null"]
    if method in ("dreambooth", "lora"):
        changes += ["method.num_class_images=4", "method.prior_generation_steps=4"]
    if method not in NO_PREVIEWS:
        changes += ["validation.num_images=1", "validation.num_inference_steps=4"]
    return changes


def train(method: str, folder: Path, changes: list[str], *words: str) -> dict[str, Any]:
    """Run `dreamfleet train` once; return its losses, held-out loss, exports and seconds, or its error."""
    recipe = ROOT / "recipes" / RECIPES[method]
    command = [sys.executable, "-m", "dreamfleet.cluster.cli", "train", str(recipe)]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, *changes, f"output_dir={folder}", *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"still running after {LIMIT} s"}
    seconds = round(time.perf_counter() - start, 1)
    if done.returncode:
        return {"failed": done.stderr.strip()[-1500:], "seconds": seconds}
    found = {**figures_of(folder), "seconds": seconds}
    print(json.dumps({"run": folder.name, **found}), flush=True)  # kept if a time limit ends the comparison
    return found


def figures_of(run: Path) -> dict[str, Any]:
    """Return what a run folder holds: losses, the last held-out figures, step seconds, images, exports."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last: dict[str, Any] = {}
    for line in lines:
        last |= {key: line[key] for key in ("holdout_loss", "clip_i", "clip_t", "accuracy") if key in line}
    summary = json.loads((run / "summary.json").read_text())
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        **last,
        "step_seconds": [line["step_seconds"] for line in lines if "step_seconds" in line][-1:],
        "images": len(list(run.rglob("*.png"))),
        "exports": sorted(path.name for path in (run / "exports").iterdir()),
        "device": summary.get("device"),
        "engine": summary.get("engine"),
        "peak": {key: value for key, value in summary.items() if "memory" in key},
    }


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the largest relative differences of two runs' losses and held-out losses."""
    if "failed" in one or "failed" in other:
        return {}
    pairs = list(zip(one["losses"], other["losses"], strict=False))
    found = {
        "steps": [len(one["losses"]), len(other["losses"])],
        "losses": max((abs(a / b - 1) for a, b in pairs), default=None),
    }
    if "holdout_loss" in one and "holdout_loss" in other:
        found["holdout_loss"] = abs(one["holdout_loss"] / other["holdout_loss"] - 1)
    return found


def compare(method: str, steps: int, parent: Path, device: str) -> dict[str, Any]:
    """Run a method on both devices; return every run and the differences from the CPU's."""
    changes = overrides(method, steps)
    gpu = [f"scaling.use_gpu={'false' if device == 'cpu' else 'true'}"]
    runs = {"cpu": train(method, parent / "cpu", [*changes, "scaling.use_gpu=false"])}
    for precision in PRECISIONS:
        with_precision = [*changes, *gpu, f"train.mixed_precision={precision}"]
        runs[precision] = train(method, parent / precision, with_precision)
    if method not in ONE_PASS:
        half = [*changes, *gpu, "train.mixed_precision=bf16"]
        train(method, parent / "resumed", [*half, f"train.max_train_steps={steps // 2}"])
        runs["resumed"] = train(method, parent / "resumed", half, "--resume")
    found = {f"{name} to cpu": difference(runs[name], runs["cpu"]) for name in PRECISIONS}
    if "resumed" in runs:
        found["resumed to bf16"] = difference(runs["resumed"], runs["bf16"])
    return {
        "differences": found,
        "runs": runs,
        "error": next((r["failed"] for r in runs.values() if "failed" in r), None),
    }


def main() -> None:
    """Compare one method's runs and print the result as one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=list(RECIPES))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="keep the run folders here")
    parser.add_argument(
        "--device", choices=["gpu", "cpu"], default="gpu", help="cpu: try this script without a GPU"
    )
    asked = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as name:
        parent = asked.folder or Path(name)
        result = compare(asked.method, asked.steps, parent, asked.device)
    print(json.dumps({"case": f"curve-{asked.method}", **result}))


if __name__ == "__main__":
    main()
