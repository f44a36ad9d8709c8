"""One of two ranks on simulated GPUs with simulated NCCL: ``python -m simulated_gpu.ranks RANK FOLDER CASE...``

Both ranks run the cases one after the other and print a line of JSON per case; an error ends the rank.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import simulated_gpu

if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "LOCAL_WORLD_SIZE": "2"}
    os.environ["LOCAL_RANK"] = sys.argv[1]
    simulated_gpu.install(devices=2)

import tiny
import torch
import torch.distributed as dist

from dreamfleet.trainers.distributed.process_group import leave_group
from dreamfleet.trainers.memory.strategies import CHOICES
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run import run as run_module

TEXT = {"name": "dreambooth", "train_text_encoder": True}
WORD = {"name": "textual_inversion", "placeholder_token": "<thing>", "initializer_token": "cat"}
#: DDP in each precision, then every engine choice; stage 3 is last, because DeepSpeed changes the process for good.
CASES: dict[str, dict[str, Any]] = {
    "DDP, fp16": {"train.mixed_precision": "fp16", "method": TEXT},
    "DDP, bf16 weights": {
        "train.mixed_precision": "bf16",
        "train.full_bf16": True,
        "engine.use_ema": True,
        "data.center_crop": False,
    },
    "DDP, a word": {"method": WORD, "train.gradient_accumulation_steps": 2},
    **{choice.name: {**choice.settings, "train.mixed_precision": "fp16"} for choice in CHOICES[1:]},
    "ZeRO-3, a word": {"engine.zero_stage": 3, "train.mixed_precision": "bf16", "method": WORD},
}


def run_case(name: str, folder: Path, rank: int) -> dict[str, Any]:
    """Run a case, stop it and resume it; return the figures of both runs."""
    changes = {key.replace(".", "__"): value for key, value in CASES[name].items()}
    recipe = build_recipe(
        tiny.make_recipe(
            folder,
            output_dir=str(folder / "runs" / name),
            scaling__num_workers=2,
            train__max_train_steps=3,
            validation={
                "prompts": ["a cat"],
                "num_images": 2,
                "num_inference_steps": 1,
                "holdout": str(folder / "held"),
                "holdout_timesteps": 1,
            },
            **changes,
        )
    )
    polls = iter([False, False, True])
    options: dict[str, Any] = {"rank": rank, "world": 2, "device": f"cuda:{rank}"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_module.run_worker(recipe, should_stop=lambda: next(polls, False), **options)
        summary = run_module.run_worker(recipe, resume=True, **options)
    messages = {str(one.message)[:300] for one in caught}
    if "zero" in summary.engine.lower():  # DeepSpeed's stage 3 waits without naming a device
        messages = {text for text in messages if not text.startswith("barrier()")}
    words = ("cuda", "nccl", "barrier", "device_id")
    return {
        "steps": summary.steps,
        "warnings": sorted(text for text in messages if any(word in text.lower() for word in words)),
        "elsewhere": simulated_gpu.ext.has_context(1 - rank),
    }


def main() -> None:
    """Run the named cases as one rank."""
    rank, folder, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    gc.freeze()
    torch.cuda.set_device(rank)
    run_module.settle_engine = lambda recipe, place: (recipe, "not planned")
    dist.init_process_group(
        "nccl",
        store=dist.FileStore(str(folder / "store"), 2),
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=5),
    )
    for name in names:
        try:
            print(json.dumps({"case": name, "error": None, **run_case(name, folder, rank)}), flush=True)
        except Exception:  # noqa: BLE001 - reported in the output
            print(json.dumps({"case": name, "error": traceback.format_exc(limit=-12)}), flush=True)
            os._exit(1)  # a normal exit could wait for the other rank forever
    dist.barrier(device_ids=[rank])
    leave_group()


if __name__ == "__main__":
    main()
