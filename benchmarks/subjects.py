"""Compares the base model, Textual Inversion and DreamBooth on two subjects by CLIP-I and CLIP-T.

The subjects are the example cat, compared with its four held-out images, and ``duck_toy`` of the DreamBooth
dataset (real photos, compared with the training photos as in the paper), which is skipped if the dataset is
not available (DREAMBENCH=folder). CLIP is the pocket model's own. Each of the ten scenes is sampled with five
seeds; the sheet shows the first.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import write_result

ROOT = Path(__file__).parent.parent
DREAMBENCH = Path(os.environ.get("DREAMBENCH", ROOT.parent / "shared/data/dreambench"))
SCENES = [
    "on a blue background",
    "on a black background",
    "on a yellow background",
    "on a white background",
    "on an orange background",
    "on the beach",
    "in the snow",
    "at night",
    "in the desert",
    "under water",
]
SEEDS = range(5)
# Captions of the training photos; those of the cat are files beside its images.
CAPTIONS = {
    "duck_toy": {
        "00": "on a black background",
        "01": "on a blue background",
        "02": "on a gray background",
        "03": "on the beach",
    }
}
STEPS, GUIDANCE = 25, float(os.environ.get("GUIDANCE", 1.5))


def score_model(model: Any, word: str, noun: str, real: list[Any]) -> tuple[dict[str, float], list[Any]]:
    """Sample every scene with every seed and score the images; return the scores and one image per scene."""
    return score_prompts(
        model, [f"a {word} {scene}" for scene in SCENES], [f"a {noun} {scene}" for scene in SCENES], real
    )


def score_prompts(
    model: Any, prompts: list[str], plain: list[str], real: list[Any]
) -> tuple[dict[str, float], list[Any]]:
    """Sample every prompt with every seed, and score the images by real images and the descriptions ``plain``."""
    from dreamfleet.trainers.config.image_request import requests_for
    from dreamfleet.trainers.evaluation.judge import score_images
    from dreamfleet.trainers.models.sampling.sample import generate
    from dreamfleet.trainers.models.vision.clip import load_clip

    start = time.perf_counter()
    images = generate(
        model,
        requests_for(
            [prompt for prompt in prompts for _ in SEEDS],
            [seed for _ in prompts for seed in SEEDS],
            steps=STEPS,
            guidance_scale=GUIDANCE,
        ),
        batch_size=10,
    )
    seconds = time.perf_counter() - start
    descriptions = [text for text in plain for _ in SEEDS]
    scores = score_images(images, prompts=descriptions, real=real, clip=load_clip())
    figures = {
        "clip_i": round(scores.means["clip_i"], 4),
        "clip_t": round(scores.means["clip_t"], 4),
        "seconds_a_picture": round(seconds / len(images), 3),
    }
    return figures, images[:: len(SEEDS)]


def read_real(folder: Path) -> list[Any]:
    """Read the real images, resized to the model's size."""
    from PIL import Image

    from dreamfleet.datasets.config import DataConfig
    from dreamfleet.datasets.index.index import build_index
    from dreamfleet.trainers.batches.vae_encoding import read_pixels

    data = DataConfig(instance_data_dir=str(folder), resolution=64)
    return [
        Image.fromarray(((read_pixels(uri, data).transpose(1, 2, 0) + 1) * 127.5).round().astype("uint8"))
        for uri in build_index(str(folder)).column("uri")
    ]


def measure_subject(name: str, noun: str, train_dir: Path, real_dir: Path, folder: Path) -> dict[str, Any]:
    """Train both methods on one subject; score them and the base model."""
    from dreamfleet.datasets.storage.storage import Storage
    from dreamfleet.trainers.artifacts.loading import load_exported
    from dreamfleet.trainers.config.model import ModelConfig
    from dreamfleet.trainers.evaluation.fidelity import spread_of_real
    from dreamfleet.trainers.launch import fit
    from dreamfleet.trainers.models.family import load_model
    from dreamfleet.trainers.models.sampling.sample import image_grid
    from dreamfleet.trainers.models.vision.clip import load_clip
    from dreamfleet.trainers.recipe import load_recipe

    real = read_real(real_dir)
    clip = load_clip()
    result: dict[str, Any] = {
        "pictures_to_judge_by": len(real),
        "clip_i_among_real": spread_of_real(clip, real),
    }
    result["untuned"], rows = score_model(load_model(ModelConfig()), noun, noun, real)
    sheet = [*rows]
    for method, recipe, word, changes in (
        ("textual_inversion", "cat-textual-inversion", "<my-cat>", [f"method.initializer_token={noun}"]),
        (
            "dreambooth",
            "demo",
            f"sks {noun}",
            [f"data.instance_prompt=a sks {noun} [filewords]", f"data.class_prompt=a {noun}"],
        ),
    ):
        out = folder / name / method
        overrides = [
            f"output_dir={out}",
            f"data.instance_data_dir={train_dir}",
            "validation.prompts=[]",
            f"validation.holdout={real_dir}",
            "scaling.num_workers=0",
            *changes,
        ]
        start = time.time()
        summary = fit(ROOT / f"recipes/{recipe}.yaml", overrides=overrides).summary
        model = load_exported(Storage(str(out)), load_recipe(ROOT / f"recipes/{recipe}.yaml", overrides))
        result[method], rows = score_model(model, word, noun, real)
        result[method] |= {
            "steps": summary.steps,
            "seconds": round(time.time() - start, 1),
            "train_seconds": round(summary.train_seconds, 1),
            "holdout_loss": summary.figures.get("holdout_loss"),
            "artefact_bytes": sum(f.stat().st_size for f in (out / "exports").glob("*.safetensors")),
        }
        sheet += rows
    ROOT.joinpath("benchmarks/results").mkdir(exist_ok=True)
    grid = image_grid([image.resize((96, 96)) for image in sheet], len(SCENES))
    grid.save(ROOT / f"benchmarks/results/subjects-{name}.png")
    return result


def with_captions(images: Path, captions: dict[str, str], folder: Path) -> Path:
    """Copy a folder of images with a caption file beside each."""
    shutil.copytree(images, folder, ignore=shutil.ignore_patterns("*.txt"))
    for stem, caption in captions.items():
        (folder / f"{stem}.txt").write_text(caption)
    return folder


def main() -> None:
    """Measure the available subjects and write the result."""
    subjects = {"cat": ("cat face", ROOT / "examples/cat/train", ROOT / "examples/cat/holdout")}
    if (DREAMBENCH / "duck_toy").is_dir():
        subjects["duck_toy"] = ("duck", DREAMBENCH / "duck_toy", DREAMBENCH / "duck_toy")
    chosen = sys.argv[1:] or list(subjects)
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for name in chosen:
            noun, train_dir, real_dir = subjects[name]
            if name in CAPTIONS:
                train_dir = with_captions(train_dir, CAPTIONS[name], Path(folder) / f"{name}-captioned")
            results[name] = measure_subject(name, noun, train_dir, real_dir, Path(folder))
    rows = "rows of the sheet: untuned, Textual Inversion, DreamBooth; columns: " + "; ".join(SCENES)
    write_result(
        "subjects",
        {**results, "guidance_scale": GUIDANCE, "sheet": rows},
        how="python benchmarks/subjects.py",
    )


if __name__ == "__main__":
    main()
