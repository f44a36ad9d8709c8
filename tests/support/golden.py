"""Short seeded loss curves of every method, kept in tests/golden/; ``--write`` makes them anew."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import tiny
from tiny_models import tiny_family

from dreamfleet.trainers.distributed.context import DistributedContext
from dreamfleet.trainers.models.stable_diffusion.pipeline_folder import save_pipeline
from dreamfleet.trainers.recipe import build_recipe
from dreamfleet.trainers.run.build import assemble

FOLDER = Path(__file__).parents[1] / "golden"
STEPS = 12
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
        save_pipeline(tiny_family(family), folder / "model")
    if changes.pop("labelled", False):
        changes["data__instance_data_dir"] = str(tiny.make_two_classes(folder / "labelled", 9))
    parts = assemble(build_recipe(tiny.make_recipe(folder, **changes)), DistributedContext())
    losses = []
    for step in range(STEPS):
        loss = parts.engine.backward(parts.prepare(parts.feed.batch(step)))
        parts.engine.step({group: rate(step) for group, rate in parts.rates.items()}, step + 1)
        losses.append(float(loss.total))
    return losses


def main() -> None:
    """Write or compare the curves."""
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            curve = compute_curve(name, Path(folder))
        path = FOLDER / f"{name}.json"
        if "--write" in sys.argv:
            FOLDER.mkdir(exist_ok=True)
            path.write_text(json.dumps([round(loss, 6) for loss in curve], indent=1) + "\n")
        kept = json.loads(path.read_text())
        print(name, "largest difference", max(abs(a - b) for a, b in zip(curve, kept, strict=True)))


if __name__ == "__main__":
    main()
