"""Compares the time of a step in our loop, with and without Ray Train, with a minimal torch loop of the same step.

Both loops train the pocket model's U-Net at 64 px, batch 8, on the same latents, noise and text, and
alternate in one process. The minimal loop has forward pass, backward pass, clipping and optimizer step; ours
adds the feed, the engine, metrics and the check for a stop request.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import spread, write_result

ROOT = Path(__file__).parent.parent
BLOCKS, STEPS = 8, 15


def measure(config: dict[str, Any]) -> None:
    """Run alternating blocks of both loops, and write the seconds per step of each block."""
    import torch.nn.functional as F

    from dreamfleet.datasets.storage.storage import Storage
    from dreamfleet.trainers.distributed.context import DistributedContext
    from dreamfleet.trainers.engines.passes import drive
    from dreamfleet.trainers.loop import Hooks, Schedule, train
    from dreamfleet.trainers.recipe import load_recipe
    from dreamfleet.trainers.report.metrics_log import MetricsLog
    from dreamfleet.trainers.run.build import assemble

    torch.set_num_threads(config["threads"])
    recipe = load_recipe(
        config["recipe"],
        [
            f"output_dir={config['folder']}",
            "train.train_batch_size=8",
            "train.snr_gamma=null",
            "method.with_prior_preservation=false",
            "validation.prompts=[]",
        ],
    )
    parts = assemble(recipe, DistributedContext())
    model, unet = parts.model, parts.model.unet
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, weight_decay=1e-2)
    ready = [parts.prepare(parts.feed.batch(step)) for step in range(STEPS)]
    metrics = MetricsLog(Storage(config["folder"]))

    def bare() -> float:
        start = time.perf_counter()
        for batch in ready:
            noisy = model.scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
            target = model.scheduler.get_velocity(batch["latents"], batch["noise"], batch["timesteps"])
            loss = F.mse_loss(unet(noisy, batch["timesteps"], batch["context"]).sample, target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return (time.perf_counter() - start) / STEPS

    def ours(first: int) -> float:
        stamps = []
        drive(
            train(
                parts.engine,
                parts.feed.stream(first),
                parts.prepare,
                rates=parts.rates,
                # One step more than is timed: a run computes its first batch twice, which must not be timed.
                schedule=Schedule(
                    total=first + STEPS + 1, save_every=10**9, sample_every=10**9, log_every=10
                ),
                seed=0,
                start_step=first,
                hooks=Hooks(log=metrics.log, should_stop=lambda: stamps.append(time.perf_counter()) or False),
            )
        )
        # should_stop is called at the beginning of every step.
        return (time.perf_counter() - stamps[1]) / STEPS

    bare(), ours(0)
    times = {"bare": [], "ours": []}
    for block in range(BLOCKS):
        times["bare"].append(bare())
        times["ours"].append(ours(100 * (block + 1)))
    Path(config["folder"], "times.json").write_text(json.dumps(times))


def main() -> None:
    """Measure in a Ray Train worker on a local Ray and in this process, and write the ratios."""
    from dreamfleet.trainers.driver.session import ray_session

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "recipe": str(ROOT / "recipes/demo.yaml"),
            "folder": f"{folder}/ray",
            "threads": torch.get_num_threads(),
        }
        Path(config["folder"]).mkdir()
        with ray_session(None):
            from ray.train import RunConfig, ScalingConfig
            from ray.train.torch import TorchTrainer

            TorchTrainer(
                measure,
                train_loop_config=config,
                scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
                run_config=RunConfig(storage_path=f"{folder}/bookkeeping", name="bench"),
            ).fit()
        times = json.loads(Path(config["folder"], "times.json").read_text())
    for name, values in times.items():
        results[f"{name}_seconds_per_step"] = spread(values)
    pairs = [ours / bare for ours, bare in zip(times["ours"], times["bare"], strict=True)]
    results["ratio_ours_to_bare"] = spread(pairs)
    results["blocks"] = f"{BLOCKS} alternating blocks of {STEPS} steps, batch 8, 64 px, pocket U-Net"
    write_result("step_overhead", results, how="python benchmarks/step_overhead.py")


if __name__ == "__main__":
    main()
