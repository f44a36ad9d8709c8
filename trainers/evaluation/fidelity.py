"""Subject fidelity (CLIP-I, DINO) and prompt fidelity (CLIP-T) of images, as defined by the DreamBooth paper.

Definitions (arXiv 2208.12242, section 4.1): CLIP-I and DINO are the mean cosine similarity over all pairs of a
generated and a real image, CLIP-T is the mean cosine similarity of each generated image and its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from PIL import Image
from torch import Tensor

from dreamfleet.trainers.models.vision.clip import ClipScorer
from dreamfleet.trainers.models.vision.dino import DinoScorer

# Shapes: N generated images, R real images, P features.


@dataclass(frozen=True)
class ScoredImages:
    """Images to score, and the prompts, real images and models for it; fields that no metric needs are empty or None.

    ``prompts`` has one entry per image, without words that CLIP does not know (see :func:`strip_words`). Features are
    computed once for all metrics.
    """

    images: Sequence[Image.Image]
    prompts: Sequence[str] = ()
    real: Sequence[Image.Image] = ()
    clip: ClipScorer | None = None
    dino: DinoScorer | None = None

    @cached_property
    def clip_features_NP(self) -> Tensor:
        """Normalised CLIP features of the images."""
        assert self.clip is not None
        return self.clip.image_features(self.images)


def clip_i(scored: ScoredImages) -> Tensor:
    """Return each image's mean cosine similarity to the real images in CLIP's space, ``[N]``."""
    assert scored.clip is not None
    real_RP = scored.clip.image_features(scored.real)
    return (scored.clip_features_NP @ real_RP.T).mean(dim=1)


def clip_t(scored: ScoredImages) -> Tensor:
    """Return each image's cosine similarity to its prompt in CLIP's space, ``[N]``."""
    assert scored.clip is not None
    prompts_NP = scored.clip.text_features(scored.prompts)
    return (scored.clip_features_NP * prompts_NP).sum(dim=1)


def dino(scored: ScoredImages) -> Tensor:
    """Return each image's mean cosine similarity to the real images in DINO's space, ``[N]``."""
    assert scored.dino is not None
    images_NP, real_RP = (scored.dino.image_features(images) for images in (scored.images, scored.real))
    return (images_NP @ real_RP.T).mean(dim=1)


def spread_of_real(scorer: ClipScorer | DinoScorer, real: Sequence[Image.Image]) -> float | None:
    """Return the mean cosine similarity over pairs of different real images, an upper reference for CLIP-I or DINO.

    None for fewer than two images.
    """
    if len(real) < 2:
        return None
    features_RP = scorer.image_features(real)
    cosines_RR = features_RP @ features_RP.T
    return float((cosines_RR.sum() - cosines_RR.diagonal().sum()) / (len(real) * (len(real) - 1)))


def strip_words(prompt: str, words: Sequence[str] | Mapping[str, str]) -> str:
    """Return a prompt without the words that CLIP does not know: "a sks cat" -> "a cat".

    Matches whole words in any case, the longest first. A mapping replaces words instead ("<my-cat>" -> "cat").
    """
    replacements = words if isinstance(words, Mapping) else dict.fromkeys(words, "")
    by_lower = {word.lower(): new for word, new in replacements.items() if word.strip()}
    if not by_lower:
        return prompt
    pattern = "|".join(re.escape(word) for word in sorted(by_lower, key=len, reverse=True))
    found = re.sub(
        rf"(?<!\w)(?:{pattern})(?!\w)", lambda m: by_lower[m[0].lower()], prompt, flags=re.IGNORECASE
    )
    return re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"\s+", " ", found)).strip()
