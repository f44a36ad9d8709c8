"""Measures Aesthetic Gradients during sampling: cosine, CLIP-I, CLIP-T and seconds for each number of steps.

Setup: the vector of the example cat on the pocket model with its own CLIP. Ten scenes, one image each, are
sampled alternately without and with the vector; each tuned prompt is sampled once uncached and once cached.
The merged form, one text encoder tuned on all ten prompts, is also measured.
"""

from __future__ import annotations

import time
from typing import Any

from measure import spread, write_result
from subjects import GUIDANCE, ROOT, SCENES, read_real

STEPS = (1, 2, 3, 5, 10, 15, 20, 30)
ROUNDS = 3


def draw(model: Any, prompts: list[str]) -> tuple[list[Any], float]:
    """Sample one image per prompt, one at a time; return the images and the seconds per image."""
    from dreamfleet.trainers.config.image_request import ImageRequest
    from dreamfleet.trainers.models.sampling.sample import generate

    start = time.perf_counter()
    images = [
        generate(model, [ImageRequest(prompt, guidance_scale=GUIDANCE)], batch_size=1)[0]
        for prompt in prompts
    ]
    return images, (time.perf_counter() - start) / len(prompts)


def measure_steps(
    model: Any, encoder_for: Any, prompts: list[str], real: list[Any], clip: Any
) -> dict[str, Any]:
    """Measure every number of tuning steps; 0 is the untuned text encoder."""
    from dreamfleet.trainers.evaluation.judge import score_images

    result: dict[str, Any] = {}
    for steps in (0, *STEPS):
        seconds: dict[str, list[float]] = {"plain": [], "new": [], "remembered": []}
        for _ in range(ROUNDS):
            model.prompt_encoder = None
            images, taken = draw(model, prompts)
            seconds["plain"].append(taken)
            if steps:
                encoder = model.prompt_encoder = encoder_for(steps)
                for kind in ("new", "remembered"):
                    images, taken = draw(model, prompts)
                    seconds[kind].append(taken)
        scores = score_images(images, prompts=prompts, real=real, clip=clip)
        record: dict[str, Any] = {
            "clip_i": round(scores.means["clip_i"], 4),
            "clip_t": round(scores.means["clip_t"], 4),
        }
        if steps:
            gained = [encoder.cosines[prompt] for prompt in prompts]
            record |= {
                "cosine_before": round(sum(one[0] for one in gained) / len(gained), 4),
                "cosine_after": round(sum(one[-1] for one in gained) / len(gained), 4),
            }
            record["cosine_a_step"] = round((record["cosine_after"] - record["cosine_before"]) / steps, 4)
        record |= {
            f"seconds_a_picture_{kind}": spread([round(s, 3) for s in times])
            for kind, times in seconds.items()
            if times
        }
        result[str(steps)] = record
        print(steps, record, flush=True)
    return result


def main() -> None:
    """Measure all numbers of steps and the merged form, and write the result."""
    import torch

    from dreamfleet.trainers.config.model import ModelConfig
    from dreamfleet.trainers.models.family import load_model
    from dreamfleet.trainers.models.stable_diffusion.aesthetic import (
        AestheticEncoder,
        AestheticSettings,
        clip_of,
    )
    from dreamfleet.trainers.models.stable_diffusion.aesthetic_export import bake

    model = load_model(ModelConfig())
    clip = clip_of(model)
    with torch.no_grad():
        vector = clip.embed(clip.preprocessing(read_real(ROOT / "examples/cat/train"))).mean(0, keepdim=True)
    prompts = [f"a cat face {scene}" for scene in SCENES]
    real = read_real(ROOT / "examples/cat/holdout")

    def encoder_for(steps: int) -> Any:
        return AestheticEncoder(model, vector, clip=clip, settings=AestheticSettings(steps=steps))

    result = measure_steps(model, encoder_for, prompts, real, clip)
    model.prompt_encoder = None
    baked = {
        str(steps): {
            name: round(value, 4)
            for name, value in bake(
                model, vector, prompts, clip=clip, settings=AestheticSettings(steps=steps)
            )
            .figures()
            .items()
        }
        for steps in (5, 10, 20)
    }
    write_result(
        "aesthetic",
        {"rounds": ROUNDS, "guidance_scale": GUIDANCE, "steps": result, "baked": baked},
        how="python benchmarks/aesthetic.py",
    )


if __name__ == "__main__":
    main()
