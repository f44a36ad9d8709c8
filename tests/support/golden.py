"""Short seeded loss curves of every method, recorded in tests/golden/; ``--write`` updates the recorded curves."""

from __future__ import annotations

import json
import math
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from tiny_models import tiny_family

from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import assemble

FOLDER = Path(__file__).parents[1] / "golden"
PROCESSOR = FOLDER / "processor_kind.json"
STEPS = 12
DIGITS = 6  # decimal places of the recorded losses
#: Relative tolerance for other processors, whose sums have another order; a changed formula changes far more.
OTHER_PROCESSOR = 2e-3
RUNS: dict[str, dict[str, Any]] = {
    "aesthetic_gradients": {"method": {"name": "aesthetic_gradients"}},
    "discriminator": {
        "method": {**tiny.DISCRIMINATOR, "label_smoothing": 0.1, "balance_classes": True},
        "labelled": True,
    },
    "dreambooth": {
        "method": {"name": "dreambooth", "train_text_encoder": True},
        "train__snr_gamma": 5.0,
        "optimizer__text_encoder_lr": 1e-4,
    },
    "dreambooth_prior": {
        "method": {"name": "dreambooth", "with_prior_preservation": True, "num_class_images": 4},
        "train__noise_offset": 0.1,
    },
    "hypernetwork": {
        "method": {
            "name": "hypernetwork",
            "layer_structure": [1, 2, 2, 1],
            "activation_func": "relu",
            "weight_init": "KaimingUniform",
            "activate_output": True,
            "multiplier": 0.8,
        },
        "optimizer__learning_rate": 1e-2,
    },
    "losses": {
        "method": {
            "name": "native",
            "lora_rank": 4,
            "loraplus_lr_ratio": 4.0,
            "up_lr_weight": "sine+0.5",
            "freeze_layers": ["unet.mid_block"],
            "scale_weight_norms": 0.05,
        },
        "train__loss_type": "huber",
        "train__debiased_estimation_loss": True,
        "train__noise_offset": 0.1,
        "train__noise_offset_random_strength": True,
        "train__multires_noise_iterations": 4,
        "train__ip_noise_gamma": 0.1,
        "train__timestep_sampling": "logit_normal",
        "train__min_timestep": 100,
        "optimizer__learning_rate": 1e-2,
    },
    "native": {
        "method": {"name": "native", "train_text_encoder": True},
        "shapes": True,
        "data__shuffle_tags": True,
        "data__tag_dropout": 0.2,
        "model__max_token_length": 150,
        "model__prediction_type": "v_prediction",
        "model__rescale_betas_zero_snr": True,
    },
    "prompt_tuning": {
        "method": {
            "name": "prompt_tuning",
            "placeholder_token": "<x>",
            "initializer_token": "cat",
            "cfg_scale": "1.5-3.0:cos2",
            "neg_lr_w": 0.5,
            "rec_loss_w": 0.2,
        },
        "optimizer__learning_rate": 5e-2,
    },
    "sdxl": {
        "method": {"name": "native", "train_text_encoder": True},
        "family": "sdxl",
        "data__center_crop": False,
        "optimizer__text_encoder_2_lr": 1e-4,
    },
    "textual_inversion": {
        "method": {
            "name": "textual_inversion",
            "placeholder_token": "<x>",
            "initializer_token": "cat",
            "num_vectors": 3,
        },
        "optimizer__learning_rate": 5e-2,
    },
}


def compute_curve(name: str, folder: Path) -> list[float]:
    """Train the run called ``name`` for a few steps on a tiny random model and return its losses."""
    changes = {"data__random_flip": True, **RUNS[name]}
    if changes["method"].get("with_prior_preservation"):
        changes["data__class_data_dir"] = str(tiny.make_images(folder / "class", 4, seed=9))
    if changes.pop("shapes", False):
        changes |= {**tiny.SHAPES, "data__instance_data_dir": str(tiny.make_shapes(folder / "shapes"))}
    if family := changes.pop("family", None):
        tiny_family(family).save_folder(folder / "model")
    if changes.pop("labelled", False):
        changes["data__instance_data_dir"] = str(tiny.make_two_classes(folder / "labelled", 9))
    parts = assemble(build_recipe(tiny.make_recipe(folder, **changes)), DistributedContext())
    losses = []
    for step in range(STEPS):
        loss = parts.engine.backward(parts.prepare(parts.feed.batch(step)))
        parts.engine.step({group: rate(step) for group, rate in parts.rates.items()}, step + 1)
        losses.append(float(loss.total))
    return losses


def read_curve(name: str) -> list[float]:
    """Return the recorded losses of the run called ``name``."""
    curve: list[float] = json.loads((FOLDER / f"{name}.json").read_text())
    return curve


def processor_kind() -> dict[str, str | int]:
    """Return what determines the order of torch's sums: processor, instruction set, version of torch, threads."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {
        "machine": platform.machine(),
        "processor": " ".join(fields.get(key, "") for key in ("model name", "cpu family", "model")).strip(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def find_difference(curve: Sequence[float], recorded: Sequence[float], *, same_processor: bool) -> str | None:
    """Return where a curve differs from the recorded one; None if it does not.

    On the recording processor every recorded digit must be equal; elsewhere losses may differ by OTHER_PROCESSOR.
    """
    for step, (loss, expected) in enumerate(zip(curve, recorded, strict=True)):
        rounded = round(loss, DIGITS)
        equal = (
            rounded == expected if same_processor else math.isclose(loss, expected, rel_tol=OTHER_PROCESSOR)
        )
        if not equal:
            return f"step {step}: {rounded}, recorded {expected}"
    return None


def main() -> None:
    """Record the curves, or print their differences from the recorded curves."""
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            curve = compute_curve(name, Path(folder))
        if "--write" in sys.argv:
            FOLDER.mkdir(parents=True, exist_ok=True)
            rounded = [round(loss, DIGITS) for loss in curve]
            (FOLDER / f"{name}.json").write_text(json.dumps(rounded, indent=1) + "\n")
            PROCESSOR.write_text(json.dumps(processor_kind(), indent=1) + "\n")
        recorded = read_curve(name)
        print(name, "largest difference", max(abs(a - b) for a, b in zip(curve, recorded, strict=True)))


if __name__ == "__main__":
    main()
