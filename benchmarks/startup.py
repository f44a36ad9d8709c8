"""Measures the seconds from a command to its first training step: dreamfleet alone, on Ray, as a job, and bare Ray.

Bare Ray is a minimal program: ``ray.init``, and a TorchTrainer with one worker that imports torch and
diffusers, loads the pocket model and takes one step. Each command is a separate process; the commands
alternate. ``submit`` sends a job to a head node with a token that already runs, with and without a worker on Ray
(the others start Ray themselves). The time of ``dreamfleet --help`` is also measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import spread, write_result

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
from ray_heads import RayHead, ray_head  # noqa: E402

ROUNDS = int(os.environ.get("ROUNDS", "3"))

BARE = """
import sys
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

def step(config):
    from pathlib import Path
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
    folder = config["model"]
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5)
    latents = vae.encode(torch.zeros(4, 3, 64, 64)).latent_dist.sample().detach()
    ids = tokenizer(["a cat"] * 4, padding="max_length", max_length=77, return_tensors="pt").input_ids
    noise, t = torch.randn_like(latents), torch.randint(0, 1000, (4,))
    loss = (unet(scheduler.add_noise(latents, noise, t), t, text(ids)[0].detach()).sample - noise).square().mean()
    loss.backward()
    optimizer.step()
    Path(config["done"]).write_text("step")

if __name__ == "__main__":
    ray.init()
    TorchTrainer(
        step,
        train_loop_config={"model": sys.argv[1], "done": sys.argv[2]},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(storage_path=sys.argv[3]),
    ).fit()
"""


SHORT = (
    "train.max_train_steps=1",
    "validation.prompts=[]",
    "validation.holdout=null",
    "method.with_prior_preservation=false",
)


def time_to_file(command: list[str], done: Path, **variables: str) -> float:
    """Start a command and return the seconds until ``done`` is not empty; wait for the command to end."""
    start = time.perf_counter()
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **variables}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    while not (done.exists() and done.stat().st_size):
        if process.poll() not in (None, 0):
            raise RuntimeError(f"failed: {' '.join(command)}")
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    process.wait()
    return seconds


def train(run: Path, *, workers: int) -> list[str]:
    """Return the arguments that train the demo for one step."""
    return [
        "train", str(ROOT / "recipes/demo.yaml"), f"output_dir={run}", f"scaling.num_workers={workers}", *SHORT
    ]  # fmt: skip


def time_submit(script: Path, run: Path, head: RayHead, *, workers: int) -> float:
    """Return the seconds from ``dreamfleet submit`` to the first step of its job."""
    command = [str(script), "submit", f"--shared={run.parent}", "--", *train(run, workers=workers)]
    variables = {"RAY_ADDRESS": head.jobs, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token}
    return time_to_file(command, run / "metrics.jsonl", **variables)


def main() -> None:
    """Measure all commands alternately, and write the result."""
    script = Path(sys.executable).with_name("dreamfleet")
    sides = ("bare_ray", "ours_ray", "ours_in_process", "submit_ray", "submit_in_process", "help")
    times: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bare.py").write_text(BARE)
        for number in range(ROUNDS):
            done = folder / f"done-{number}"
            bare = [sys.executable, str(folder / "bare.py"), str(ROOT / "trainers/models/pocket")]
            times["bare_ray"].append(time_to_file([*bare, str(done), str(folder / "ray")], done))
            for side, workers in (("ray", 1), ("in_process", 0)):
                run = folder / f"{side}-{number}"
                command = [str(script), *train(run, workers=workers)]
                times[f"ours_{side}"].append(time_to_file(command, run / "metrics.jsonl"))
                with ray_head(folder, nodes=1, environment={}) as head:
                    run = folder / f"submit-{side}-{number}"
                    times[f"submit_{side}"].append(time_submit(script, run, head, workers=workers))
            start = time.perf_counter()
            subprocess.run([str(script), "--help"], check=True, stdout=subprocess.DEVNULL)
            times["help"].append(time.perf_counter() - start)
    ratios = [ours / bare for ours, bare in zip(times["ours_ray"], times["bare_ray"], strict=True)]
    write_result(
        "startup",
        {
            **{f"{side}_seconds": spread(values) for side, values in times.items()},
            "ratio_ours_ray_to_bare": spread(ratios),
        },
        how="python benchmarks/startup.py",
    )


if __name__ == "__main__":
    main()
