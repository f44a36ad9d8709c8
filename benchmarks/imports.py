"""Trains imported recipes, and compares the first ten losses with those of the other program's own code.

One config each of kohya, OneTrainer and diffusers is imported, for the shipped cat and the pocket model. Ours trains
ten steps and records the latents, noise, timesteps and tokens of each. Then the other program's code trains the same
model from the same weights on the same tensors (``benchmarks/import_peers.py`` says which code that is). Losses are
compared before every step, so an optimizer, schedule or LoRA that differs shows from the second one on.

``PEERS`` names a folder with checkouts of kohya-ss/sd-scripts, Nerogar/OneTrainer and huggingface/diffusers, as
``OWNER+NAME``, and ``deps`` with the packages that they import; programs that are absent are skipped, visibly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import write_result

ROOT = Path(__file__).parent.parent
POCKET = ROOT / "trainers/models/pocket"
CAT = ROOT / "examples/cat/train"
PEERS = Path(os.environ.get("PEERS", ROOT.parent / "peers"))
STEPS = 10
FOLDERS = {
    "kohya": "kohya-ss+sd-scripts",
    "onetrainer": "Nerogar+OneTrainer",
    "diffusers": "huggingface+diffusers",
}
# Each program's config, in its own format.
CONFIGS = {
    "kohya": (
        "kohya.txt",
        (
            f"accelerate launch train_network.py --pretrained_model_name_or_path={POCKET} --train_data_dir={CAT} "
            "--resolution=64 --network_module=networks.lora --network_dim=8 --network_alpha=4 --learning_rate=1e-3 "
            "--unet_lr=1e-3 --text_encoder_lr=5e-4 --max_train_steps=40 --train_batch_size=4 --lr_scheduler=cosine "
            "--lr_warmup_steps=4 --optimizer_type=AdamW --optimizer_args weight_decay=0.1 betas=0.9,0.99 "
            "--min_snr_gamma=5 --caption_extension=.txt --max_grad_norm=1 --seed=1 --noise_offset=0.05"
        ),
    ),
    "onetrainer": (
        "onetrainer.json",
        json.dumps(
            {
                "__version": 11,
                "training_method": "LORA",
                "model_type": "STABLE_DIFFUSION_15",
                "base_model_name": str(POCKET),
                "concepts": [{"__version": 2, "path": str(CAT), "text": {"prompt_source": "sample"}}],
                "resolution": "64",
                "aspect_ratio_bucketing": False,
                "epochs": 30,
                "batch_size": 4,
                "learning_rate": 1e-3,
                "learning_rate_warmup_steps": 4,
                "train_dtype": "FLOAT_32",
                "lora_rank": 8,
                "lora_alpha": 4.0,
                "layer_filter_preset": "attn-mlp",
                "layer_filter": "attentions",
                "text_encoder": {"train": False},
                "loss_weight_fn": "MIN_SNR_GAMMA",
                "loss_weight_strength": 5.0,
                "optimizer": {"optimizer": "ADAMW", "weight_decay": 0.1},
            }
        ),
    ),
    "diffusers": (
        "diffusers.sh",
        (
            f"accelerate launch train_dreambooth.py --pretrained_model_name_or_path={POCKET} --instance_data_dir={CAT} "
            "--instance_prompt='a sks cat face' --resolution=64 --train_batch_size=4 --learning_rate=2e-4 "
            "--lr_scheduler=cosine --lr_warmup_steps=4 --max_train_steps=40 --train_text_encoder --snr_gamma=5 "
            "--seed=1 --center_crop --max_grad_norm=1"
        ),
    ),
}


@dataclass
class Record:
    """What ten steps of one training used: a batch's tensors for each step, the initial adapters, and the losses."""

    batches: list[dict[str, torch.Tensor]] = field(default_factory=list)
    adapters: dict[str, torch.Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)


def train_ours(name: str, folder: Path) -> tuple[Record, str]:
    """Import a program's config and train ten steps; return what they used, and the recipe."""
    from dreamfleet.trainers.distributed.context import DistributedContext
    from dreamfleet.trainers.imports.translate import import_files
    from dreamfleet.trainers.recipe import load_recipe
    from dreamfleet.trainers.run.build import assemble

    file, text = CONFIGS[name]
    (folder / file).write_text(text)
    imported = import_files([str(folder / file)])
    assert imported.program == name and not imported.blocking, imported.report()
    (folder / "recipe.yaml").write_text(imported.text)
    recipe = load_recipe(
        folder / "recipe.yaml",
        [f"output_dir={folder}/{name}", "scaling.num_workers=0", "scaling.use_gpu=false"],
    )
    parts = assemble(recipe, DistributedContext())
    record = Record(adapters={key: value.detach().clone() for key, value in parts.method.state().items()})
    for step in range(STEPS):
        rates = {group: rate(step) for group, rate in parts.rates.items()}
        batch = parts.prepare(parts.engine.to_device(parts.feed.batch(step)))
        kept = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        record.batches.append({key: value.detach().clone() for key, value in kept.items()})
        parts.engine.begin_step(rates, step + 1)
        record.losses.append(float(parts.engine.backward(batch).total))
        parts.engine.step(rates, step + 1)
    return record, imported.text


def compare(name: str) -> dict[str, Any]:
    """Return the losses of both, and their largest relative difference; or why the other program was skipped."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        record, _ = train_ours(name, folder)
        result: dict[str, Any] = {"ours": [round(loss, 7) for loss in record.losses]}
        source = PEERS / FOLDERS[name]
        if not source.is_dir():
            print(f"{name}: skipped, {source} is absent (set PEERS)")
            return {**result, "skipped": f"no {FOLDERS[name]} in PEERS"}
        torch.save(vars(record), folder / "record.pt")
        done = subprocess.run(
            [sys.executable, str(ROOT / "benchmarks/import_peers.py"), name, str(folder)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(
                    [str(source), str(PEERS / "deps"), os.environ.get("PYTHONPATH", "")]
                ),
            },
            cwd=folder,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(f"{name}: skipped, its code does not run here:\n{done.stderr[-2000:]}")
            return {
                **result,
                "skipped": f"its code does not run here: {done.stderr.strip().splitlines()[-1]}",
            }
        theirs = json.loads((folder / "theirs.json").read_text())
    differences = [abs(a - b) / b for a, b in zip(record.losses, theirs, strict=True)]
    print(f"{name}: largest relative difference of {STEPS} losses {max(differences):.2e}")
    return {
        **result,
        "theirs": [round(loss, 7) for loss in theirs],
        "largest_relative_difference": max(differences),
        "of_the_first_loss": differences[0],
    }


def main() -> None:
    """Compare the programs named on the command line, all by default, and write the result."""
    names = sys.argv[1:] or list(FOLDERS)
    write_result(
        "imports", {name: compare(name) for name in names}, how="PEERS=FOLDER python benchmarks/imports.py"
    )


if __name__ == "__main__":
    main()
