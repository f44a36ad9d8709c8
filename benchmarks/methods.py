"""Measures the six methods on a subject and on a style: CLIP-I, CLIP-T, held-out loss, seconds and artifact size.

Subject: the example cat in ten scenes, compared with its four held-out images. Style: the example ink
drawings, for ten objects that are in no training image, compared with six drawings of other objects. Each
method runs its recipe `recipes/cat-*.yaml`; for the style only the necessary keys are changed (`WAYS` below).
Every prompt is sampled with five seeds and the same guidance; CLIP is the pocket model's own. A sheet shows
an image of each prompt.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from measure import write_result
from subjects import GUIDANCE, ROOT, SCENES, read_real, score_prompts

THINGS = [
    "castle",
    "penguin",
    "umbrella",
    "strawberry",
    "snail",
    "dog face",
    "lemon",
    "turtle",
    "red car",
    "red rose",
]


class Task(NamedTuple):
    """A subject or style: the folder of its images, and prompts in which ``{}`` is replaced by a method's word.

    ``real_is`` is the beginning of the descriptions of the real images; their captions complete it.
    """

    name: str
    images: Path
    prompts: list[str]
    plain: list[str]
    real_is: str = ""


class Way(NamedTuple):
    """The training of a method on one task: its recipe, its word in prompts, and the changed keys."""

    recipe: str
    word: str
    changes: tuple[str, ...] = ()


SUBJECT = Task(
    "cat",
    ROOT / "examples/cat",
    [f"a {{}} {scene}" for scene in SCENES],
    [f"a cat face {scene}" for scene in SCENES],
    real_is="a cat face",
)
STYLE = Task(
    "ink", ROOT / "examples/ink", [f"a {thing} {{}}" for thing in THINGS], [f"a {thing}" for thing in THINGS]
)
UNTUNED = {"cat": "cat face", "ink": ""}
TEMPLATE = f"method.template_file={ROOT}/recipes/templates/thing-in-style.txt"
WAYS = {
    "cat": {
        "textual_inversion": Way("cat-textual-inversion", "<my-cat>"),
        "prompt_tuning": Way(
            "cat-prompt-tuning", "<my-cat>", (f"data.instance_data_dir={ROOT}/examples/cat/train",)
        ),
        "hypernetwork": Way("cat-hypernetwork", "cat face"),
        "dreambooth": Way("demo", "sks cat face"),
        "native": Way("cat-native", "sks cat face"),
        "aesthetic_gradients": Way("cat-aesthetic", "cat face"),
    },
    "ink": {
        "textual_inversion": Way(
            "cat-textual-inversion",
            "<ink>",
            ("method.placeholder_token=<ink>", "method.initializer_token=on a white background", TEMPLATE),
        ),
        "prompt_tuning": Way(
            "cat-prompt-tuning",
            "<ink>",
            ("method.placeholder_token=<ink>", "method.initializer_token=on a white background", TEMPLATE),
        ),
        "hypernetwork": Way("cat-hypernetwork", "", ("data.instance_prompt='[filewords]'",)),
        "dreambooth": Way(
            "demo",
            "sks",
            ("data.instance_prompt='[filewords] sks'", "data.class_prompt=a house on a white background"),
        ),
        "native": Way("cat-native", "sks", ("data.caption_prefix=", "data.caption_suffix=sks")),
        "aesthetic_gradients": Way("cat-aesthetic", "", ("data.instance_prompt='[filewords]'",)),
    },
}


def measure_method(
    task: Task, method: str, way: Way, folder: Path, real: list[Any]
) -> tuple[dict[str, Any], list[Any]]:
    """Train one method and score its samples; return the scores and one image per prompt."""
    from dreamfleet.datasets.storage.storage import Storage
    from dreamfleet.trainers.artifacts.loading import load_exported
    from dreamfleet.trainers.launch import fit
    from dreamfleet.trainers.recipe import load_recipe

    out = folder / task.name / method
    recipe = ROOT / f"recipes/{way.recipe}.yaml"
    overrides = [
        f"output_dir={out}",
        f"data.instance_data_dir={task.images}/train",
        f"validation.holdout={task.images}/holdout",
        "validation.prompts=[]",
        "validation.metrics=[loss]",
        "scaling.num_workers=0",
        *way.changes,
    ]
    summary = fit(recipe, overrides=overrides).summary
    model = load_exported(Storage(str(out)), load_recipe(recipe, overrides))
    figures, images = score_prompts(model, fill(task.prompts, way.word), task.plain, real)
    sizes = {path.suffix: path.stat().st_size for path in (out / "exports").iterdir() if path.is_file()}
    return {
        **figures,
        "holdout_loss": summary.figures.get("holdout_loss"),
        "steps": summary.steps,
        "train_seconds": round(summary.train_seconds, 1),
        "artefact_bytes": sizes.get(".safetensors", sizes.get(".pt")),
    }, images


def fill(prompts: list[str], word: str) -> list[str]:
    """Insert a method's word into the prompts."""
    return [prompt.format(word).strip() for prompt in prompts]


def measure_task(task: Task, folder: Path, methods: list[str]) -> dict[str, Any]:
    """Measure the base model and every method on one task, and write the sheet of images."""
    from dreamfleet.trainers.config.model import ModelConfig
    from dreamfleet.trainers.evaluation.fidelity import spread_of_real
    from dreamfleet.trainers.evaluation.judge import score_images
    from dreamfleet.trainers.models.family import load_model
    from dreamfleet.trainers.models.sampling.sample import image_grid
    from dreamfleet.trainers.models.vision.clip import load_clip

    real, clip = read_real(task.images / "holdout"), load_clip()
    said = [path.read_text().strip() for path in sorted((task.images / "holdout").glob("*.txt"))]
    texts = [f"{task.real_is} {text}".strip() for text in said]
    result: dict[str, Any] = {
        "pictures_to_judge_by": len(real),
        "clip_i_among_real": round(spread_of_real(clip, real), 4),
        "clip_t_of_real": round(score_images(real, prompts=texts, real=real, clip=clip).means["clip_t"], 4),
    }
    untuned = fill(task.prompts, UNTUNED[task.name])
    result["untuned"], sheet = score_prompts(load_model(ModelConfig()), untuned, task.plain, real)
    for method in methods:
        result[method], row = measure_method(task, method, WAYS[task.name][method], folder, real)
        sheet += row
        print(task.name, method, result[method], flush=True)
    grid = image_grid([image.resize((96, 96)) for image in sheet], len(task.prompts))
    grid.save(ROOT / f"benchmarks/results/methods-{task.name}.png")
    return result


def main() -> None:
    """Measure both tasks, or those named on the command line, and write the result."""
    tasks = [task for task in (SUBJECT, STYLE) if not sys.argv[1:] or task.name in sys.argv[1:]]
    methods = list(WAYS["cat"])
    with tempfile.TemporaryDirectory() as folder:
        results = {task.name: measure_task(task, Path(folder), methods) for task in tasks}
    write_result(
        "methods",
        {
            **results,
            "guidance_scale": GUIDANCE,
            "sheet": "rows: untuned, " + ", ".join(methods) + "; columns: the prompts",
        },
        how=" ".join(["python benchmarks/methods.py", *sys.argv[1:]]),
    )


if __name__ == "__main__":
    main()
