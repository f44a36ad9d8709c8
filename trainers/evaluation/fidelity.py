"""Subject fidelity (CLIP-I, DINO) and prompt fidelity (CLIP-T) of images, as defined by the DreamBooth paper.

Definitions (arXiv 2208.12242, section 4.1): CLIP-I and DINO are the mean cosine similarity over all pairs of a
generated and a real image, CLIP-T is the mean cosine similarity of each generated image and its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from PIL import Image
from torch import Tensor

from dreamfleet.trainers.models.vision.clip import ClipScorer
from dreamfleet.trainers.models.vision.dino import DinoScorer

# Shapes: N generated images, R real images, P features.
# The mean colour of the images that CLIP was trained on, which its preprocessing maps to zero.
BACKGROUND = (123, 117, 104)
CONSTANT = (
    "real",
    "subject",
    "training",
    "base",
    "base_class_images",
)  # sets that are the same in every round


@dataclass(frozen=True)
class ScoredImages:
    """Images to score, and the prompts, other images and models for it; fields that no metric needs are empty or None.

    ``prompts`` has one entry per image, without words that CLIP does not know (see :func:`strip_words`). ``real``:
    held-out images of the subject, or else training images. ``masks``: the subject's mask in each of them (greyscale,
    white on the subject), None without one. ``training``: training images. ``base``: the untuned model's images of
    the same prompts and seeds, in the order of ``images``. ``class_images`` and ``base_class_images``: the tuned and
    the untuned model's images of the class prompts. Features are computed once for all metrics; ``constant`` keeps
    those of the sets named in ``CONSTANT`` for the next round.
    """

    images: Sequence[Image.Image]
    prompts: Sequence[str] = ()
    real: Sequence[Image.Image] = ()
    clip: ClipScorer | None = None
    dino: DinoScorer | None = None
    masks: Sequence[Image.Image | None] = ()
    training: Sequence[Image.Image] = ()
    base: Sequence[Image.Image] = ()
    class_images: Sequence[Image.Image] = ()
    base_class_images: Sequence[Image.Image] = ()
    constant: dict[tuple[str, str], Tensor] = field(default_factory=dict, repr=False, compare=False)
    _own: dict[tuple[str, str], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def subject(self) -> list[Image.Image]:
        """The real images, with the background replaced by ``BACKGROUND`` where there is a mask."""
        masks = self.masks or [None] * len(self.real)
        return [
            image if mask is None else mask_out(image, mask)
            for image, mask in zip(self.real, masks, strict=True)
        ]

    @property
    def judges(self) -> list[str]:
        """The names of the image encoders that are given: ``clip``, ``dino`` or both."""
        return [name for name in ("clip", "dino") if getattr(self, name) is not None]

    def features(self, judge: str, images: str = "images") -> Tensor:
        """Return the normalised features ``[K, P]`` of the K images in a field, by ``clip`` or ``dino``."""
        kept = self.constant if images in CONSTANT else self._own
        if (judge, images) not in kept:
            kept[judge, images] = getattr(self, judge).image_features(getattr(self, images))
        return kept[judge, images]

    def text_features(self) -> Tensor:
        """Return CLIP's normalised features ``[N, P]`` of the prompts."""
        if ("text", "prompts") not in self._own:
            assert self.clip is not None
            self._own["text", "prompts"] = self.clip.text_features(self.prompts)
        return self._own["text", "prompts"]

    def prompt_similarity(self, images: str = "images") -> Tensor:
        """Return the cosine similarity ``[N]`` in CLIP's space of each image in a field to the prompt in its place."""
        return (self.features("clip", images) * self.text_features()).sum(dim=1)


def clip_i(scored: ScoredImages) -> Tensor:
    """Return each image's mean cosine similarity to the real images in CLIP's space, ``[N]``."""
    return (scored.features("clip") @ scored.features("clip", "real").T).mean(dim=1)


def clip_t(scored: ScoredImages) -> Tensor:
    """Return each image's cosine similarity to its prompt in CLIP's space, ``[N]``."""
    return scored.prompt_similarity()


def dino(scored: ScoredImages) -> Tensor:
    """Return each image's mean cosine similarity to the real images in DINO's space, ``[N]``."""
    return (scored.features("dino") @ scored.features("dino", "real").T).mean(dim=1)


def mask_out(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Replace the image outside a mask by ``BACKGROUND``. White is the subject; a black mask changes nothing."""
    if not mask.getbbox():
        return image
    fitted = mask.convert("L").resize(image.size, Image.Resampling.BILINEAR)
    return Image.composite(image.convert("RGB"), Image.new("RGB", image.size, BACKGROUND), fitted)


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
