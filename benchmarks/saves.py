"""Measures what checkpoints cost: seconds in and beside the training loop, on disk and in S3, of any checkout.

The pocket model is trained with DreamBooth by ranks that are started as processes of this machine, with a checkpoint
every ten steps and without any; SeaweedFS serves as S3. Steps after a save show what its background work takes from
them. Run it quiet, and on the code to compare with: ``saves.py --checkout FOLDER``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def train(config: dict[str, Any]) -> None:
    """Train as one rank; rank 0 writes the times of steps and saves to ``config["out"]``."""
    import torch
    import torch.distributed as dist

    from dreamfleet.trainers.distributed.process_group import leave_group
    from dreamfleet.trainers.recipe import load_recipe
    from dreamfleet.trainers.run.checkpoint import Checkpoints
    from dreamfleet.trainers.run.checkpointing import Checkpointing
    from dreamfleet.trainers.run.run import run_worker

    rank, world = config["rank"], config["workers"]
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{config['meeting']}", rank=rank, world_size=world
        )
    steps: list[float] = []
    saves: list[tuple[int, float]] = []
    stored: list[float] = []
    last = [0.0]

    def timed(owner: Any, name: str, note: Any) -> None:
        whole = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = whole(*args, **options)
            note(time.perf_counter() - began)
            return result

        setattr(owner, name, call)

    # The check whether to stop is polled once a step: the time between two polls is a step with all that follows it.
    def poll() -> bool:
        now = time.perf_counter()
        if last[0]:
            steps.append(now - last[0])
        last[0] = now
        return False

    timed(Checkpointing, "save", lambda seconds: saves.append((len(steps), seconds)))
    # The whole write of a checkpoint: in the loop, or by a thread and, for a bucket, its copy.
    for name in ("save", "write", "adopt"):
        if hasattr(Checkpoints, name):
            timed(Checkpoints, name, stored.append)
    recipe = load_recipe(config["recipe"], config["overrides"])
    began = time.perf_counter()
    run_worker(recipe, rank=rank, world=world, should_stop=poll)
    if rank == 0:
        found = {"steps": steps, "saves": saves, "stored": stored, "whole": time.perf_counter() - began}
        Path(config["out"]).write_text(json.dumps(found))
    if world > 1:
        leave_group()


def measure(
    checkout: Path, folder: str, scratch: Path, *, workers: int, total: int, every: int
) -> dict[str, Any]:
    """Run one training in processes of ``checkout``; return the times that rank 0 wrote."""
    out = scratch / f"{len(list(scratch.iterdir()))}.json"
    config: dict[str, Any] = {
        "workers": workers,
        "meeting": str(out.with_suffix(".meeting")),
        "out": str(out),
        "recipe": str(checkout / "recipes" / "demo.yaml"),
        "overrides": [
            f"output_dir={folder}",
            f"train.max_train_steps={total}",
            f"train.checkpointing_steps={every}",
            f"train.log_steps={total}",
            "train.train_batch_size=4",
            "train.export=false",
            "method.with_prior_preservation=false",
            "validation.prompts=[]",
            "validation.holdout=null",
            "validation.metrics=[]",
            "engine.use_ema=true",
            f"scaling.num_workers={workers}",
        ],
    }
    environment = {**os.environ, "PYTHONPATH": str(checkout / "build" / "types"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--rank"]
    ranks = [
        subprocess.Popen([*command, json.dumps({**config, "rank": rank})], env=environment, cwd=checkout)
        for rank in range(workers)
    ]
    if any(rank.wait() for rank in ranks):
        raise SystemExit("a rank failed")
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def summarise(with_saves: dict[str, Any], without: dict[str, Any]) -> dict[str, Any]:
    """Return seconds of a step, of a save in the loop and in all, and what each save adds to the run."""
    saves = with_saves["saves"][:-1]  # the last is at the end of the run
    step = statistics.median(without["steps"])
    in_loop = [seconds for _, seconds in saves]
    extra = (sum(with_saves["steps"]) - sum(without["steps"])) / max(1, len(saves))
    return {
        "step": step,
        "save_in_loop": statistics.median(in_loop),
        "save_in_loop_max": max(in_loop),
        "save_in_loop_of_a_step": statistics.median(in_loop) / step,
        "save_written": sum(with_saves["stored"]) / (len(saves) + 1),
        "save_adds_to_the_run": extra,
        "steps_with_saves": sum(with_saves["steps"]),
        "steps_without": sum(without["steps"]),
    }


def main() -> None:
    """Measure a checkout on disk and in S3, and write ``results/saves-NAME.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkout", type=Path, default=ROOT)
    parser.add_argument("--name", default="now")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        train(json.loads(options.rank))
        return
    sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "build" / "types")]
    from measure import write_result
    from servers import start_s3

    server = start_s3()
    os.environ.update(server.environment())
    results = {}
    with tempfile.TemporaryDirectory(prefix="dreamfleet-saves-") as folder:
        scratch = Path(folder)
        for storage, root in (("disk", f"{folder}/runs"), ("s3", server.new_folder())):
            sizes = {"workers": options.workers, "total": options.steps}
            runs = [
                measure(options.checkout, f"{root}/{name}", scratch, every=every, **sizes)
                for name, every in (("without", options.steps), ("with", options.every))
            ]
            results[storage] = summarise(runs[1], runs[0])
    write_result(f"saves-{options.name}", results, how=f"benchmarks/saves.py --name {options.name}")


if __name__ == "__main__":
    main()
