"""Compares prompt tuning and Textual Inversion trained on one image: CLIP-I to held-out images, CLIP-T in scenes.

The subject is the example cat: one training image, and four held-out images for the scores. Both methods have
the same number of U-Net passes: prompt tuning needs two per sample, so Textual Inversion trains twice as many
steps. Both start from "cat face", with two vectors in the prompt, at the same learning rate. Each is trained
with three seeds; CLIP is the pocket model's own. The sheet shows the images of the first seed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from measure import spread, write_result
from subjects import GUIDANCE, ROOT, SCENES, SEEDS, read_real, score_model

TRAIN_SEEDS = range(3)
STEPS = 200
METHODS = {"textual_inversion": 2 * STEPS, "prompt_tuning": STEPS}


def train_one(method: str, seed: int, folder: Path, real: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """Train a method on the image with a seed, and score it; return the scores and one image per scene."""
    from dreamfleet.datasets.storage.storage import Storage
    from dreamfleet.trainers.artifacts.loading import load_exported
    from dreamfleet.trainers.launch import fit
    from dreamfleet.trainers.recipe import load_recipe

    recipe = ROOT / f"recipes/cat-{method.replace('_', '-')}.yaml"
    out = folder / f"{method}-{seed}"
    overrides = [
        f"output_dir={out}",
        f"data.instance_data_dir={ROOT}/examples/cat/one",
        f"train.max_train_steps={METHODS[method]}",
        f"train.seed={seed}",
        "validation.prompts=[]",
        "scaling.num_workers=0",
    ]
    summary = fit(recipe, overrides=overrides).summary
    model = load_exported(Storage(str(out)), load_recipe(recipe, overrides))
    scores, images = score_model(model, "<my-cat>", "cat face", real)
    return {**scores, "train_seconds": round(summary.train_seconds, 1)}, images


def main() -> None:
    """Train both methods with every seed, and write their scores and the sheet."""
    from dreamfleet.trainers.evaluation.fidelity import spread_of_real
    from dreamfleet.trainers.models.sampling.sample import image_grid
    from dreamfleet.trainers.models.vision.clip import load_clip

    real = read_real(ROOT / "examples/cat/holdout")
    result: dict[str, Any] = {
        "clip_i_among_real": spread_of_real(load_clip(), real),
        "guidance_scale": GUIDANCE,
    }
    sheet: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for method, steps in METHODS.items():
            runs = [train_one(method, seed, Path(folder), real) for seed in TRAIN_SEEDS]
            sheet += runs[0][1]
            result[method] = {"steps": steps, "pictures_a_run": len(SCENES) * len(SEEDS)}
            for name in runs[0][0]:
                result[method][name] = spread([figures[name] for figures, _ in runs])
    grid = image_grid([image.resize((96, 96)) for image in sheet], len(SCENES))
    grid.save(ROOT / "benchmarks/results/one_image.png")
    rows = "rows of the sheet: Textual Inversion, prompt tuning; columns: " + "; ".join(SCENES)
    write_result(
        "one_picture", {**result, "sheet": rows}, how=f"GUIDANCE={GUIDANCE} python benchmarks/one_image.py"
    )


if __name__ == "__main__":
    main()
