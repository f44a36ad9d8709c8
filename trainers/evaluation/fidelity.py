"""How true pictures are to a subject (CLIP-I, DINO) and to their prompts (CLIP-T), as the DreamBooth paper measures it.

Definitions (arXiv 2208.12242, section 4.1): CLIP-I and DINO are the mean cosine over all pairs of a generated and a
real picture, CLIP-T is the mean cosine of each generated picture and its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from dreamfleet.datasets.errors import UserError
from dreamfleet.trainers.models.vision.clip import ClipScorer
from dreamfleet.trainers.models.vision.dino import DinoScorer

# N generated pictures, P features.

MOST_REAL = (
    64  # of a training set that pictures are compared with, as they lie in memory: the first by their hash
)


@dataclass(frozen=True)
class Scores:
    """Means over the pictures; None where there was nothing to compare with. `pictures` has the same for each one."""

    clip_i: float | None
    clip_t: float | None
    dino: float | None
    num_pictures: int
    num_real: int
    clip: str
    dino_model: str | None = None
    pictures: list[dict[str, Any]] = field(default_factory=list)


def clip_i(clip: ClipScorer, generated: Sequence[Image.Image], real: Sequence[Image.Image]) -> float:
    """Mean cosine over all pairs of a generated and a real picture, as CLIP sees them."""
    return float((clip.image_features(generated) @ clip.image_features(real).T).mean())


def dino_i(dino: DinoScorer, generated: Sequence[Image.Image], real: Sequence[Image.Image]) -> float:
    """Mean cosine over all pairs of a generated and a real picture, as DINO sees them: the paper's DINO."""
    return float((dino.image_features(generated) @ dino.image_features(real).T).mean())


def clip_t(
    clip: ClipScorer,
    generated: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    strip: Sequence[str] | Mapping[str, str] = (),
) -> float:
    """Mean cosine of each picture and its own prompt, `strip` words taken out of it (see `strip_words`)."""
    features = clip.text_features([strip_words(prompt, strip) for prompt in prompts])
    return float((clip.image_features(generated) * features).sum(dim=1).mean())


def spread_of_real(scorer: ClipScorer | DinoScorer, real: Sequence[Image.Image]) -> float | None:
    """Mean cosine over pairs of different real pictures, the ceiling of CLIP-I; None for fewer than two."""
    if len(real) < 2:
        return None
    cosines = scorer.image_features(real) @ scorer.image_features(real).T
    return float((cosines.sum() - cosines.diagonal().sum()) / (len(real) * (len(real) - 1)))


def strip_words(prompt: str, words: Sequence[str] | Mapping[str, str]) -> str:
    """Take words that CLIP cannot know out of a prompt: "a sks cat" -> "a cat".

    Whole words, any case, longest first. A mapping puts other words in their place ("<my-cat>" -> "cat").
    """
    swaps = words if isinstance(words, Mapping) else dict.fromkeys(words, "")
    by_lower = {word.lower(): swap for word, swap in swaps.items() if word.strip()}
    if not by_lower:
        return prompt
    pattern = "|".join(re.escape(word) for word in sorted(by_lower, key=len, reverse=True))
    found = re.sub(
        rf"(?<!\w)(?:{pattern})(?!\w)", lambda m: by_lower[m[0].lower()], prompt, flags=re.IGNORECASE
    )
    return re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"\s+", " ", found)).strip()


def score_images(
    images: Sequence[Image.Image],
    *,
    prompts: Sequence[str] | None = None,
    real: Sequence[Image.Image] | None = None,
    clip: ClipScorer,
    dino: DinoScorer | None = None,
    strip: Sequence[str] | Mapping[str, str] = (),
) -> Scores:
    """Score N pictures against their prompts (one for all, or N) and real pictures of the subject.

    `strip` names words of the prompts that CLIP should not see. Raises UserError when there is nothing to compare with.
    """
    if not images:
        raise UserError("there are no pictures to score.")
    if not prompts and not real:
        raise UserError(
            "scores need real pictures of the subject (--real FOLDER), prompts (--prompt), or both."
        )
    if prompts and len(prompts) not in (1, len(images)):
        raise UserError(f"{len(images)} pictures need one prompt for all or one each, not {len(prompts)}.")
    asked = list(prompts) * (len(images) if prompts and len(prompts) == 1 else 1) if prompts else []
    features_NP = clip.image_features(images)
    columns: dict[str, Tensor] = {}
    if real:
        columns["clip_i"] = (features_NP @ clip.image_features(real).T).mean(dim=1)
        if dino is not None:
            columns["dino"] = (dino.image_features(images) @ dino.image_features(real).T).mean(dim=1)
    if asked:
        texts_NP = clip.text_features([strip_words(prompt, strip) for prompt in asked])
        columns["clip_t"] = (features_NP * texts_NP).sum(dim=1)
    each: list[dict[str, Any]] = [{"prompt": asked[i]} if asked else {} for i in range(len(images))]
    for name, values in columns.items():
        for entry, value in zip(each, values.tolist(), strict=True):
            entry[name] = value
    means = {name: float(values.mean()) for name, values in columns.items()}
    return Scores(
        clip_i=means.get("clip_i"),
        clip_t=means.get("clip_t"),
        dino=means.get("dino"),
        num_pictures=len(images),
        num_real=len(real or ()),
        clip=clip.name,
        dino_model=dino.name if dino is not None else None,
        pictures=each,
    )
