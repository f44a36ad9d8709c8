"""Which image a file beside it belongs to, by names alone: endings in any case, either Unicode form. Pure."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence

from dreamfleet.datasets.images.image_formats import ATTENTION_ENDING, MASK_ENDING


class Pairs:
    """Says which images a file beside them belongs to, by names alone."""

    def __init__(self, images: Iterable[str]):
        self.images = list(images)
        self._exact = frozenset(self.images)
        self._named: dict[str, list[str]] = {}
        self._stems: dict[str, list[str]] = {}
        for image in self.images:
            self._named.setdefault(same_name(image), []).append(image)
            self._stems.setdefault(composed(os.path.splitext(image)[0]), []).append(image)

    def named(self, name: str) -> list[str]:
        """Return the images of a whole name: the very one, else those whose name differs in Unicode form or `.JPG`."""
        return [name] if name in self._exact else self._named.get(same_name(name), [])

    def owners(self, base: str) -> list[str]:
        """Return the images that a file called ``base`` and an ending belongs to: of that name, else of that stem."""
        return self.named(base) or self._stems.get(composed(base), [])

    def lone(self, image: str) -> bool:
        """Say whether a file called the image's stem and an ending is the image's alone."""
        return self.owners(os.path.splitext(image)[0]) == [image]


def same_name(name: str) -> str:
    """Return what names of images are compared by: composed, the ending in lower case."""
    stem, ending = os.path.splitext(name)
    return composed(stem) + ending.lower()


def masks_beside(images: Sequence[str]) -> dict[str, list[str]]:
    """Return those of the pictures that are masks of others, and whose they are: what counts more comes later.

    `NAME.mask.png` counts more than the attention map `NAME_att.png`, a whole name more than a stem.
    """
    bases = {}
    for name in images:
        stem = os.path.splitext(name)[0]
        if name.lower().endswith(MASK_ENDING):
            bases[name] = name[: -len(MASK_ENDING)]
        elif stem.endswith(ATTENTION_ENDING):
            bases[name] = stem.removesuffix(ATTENTION_ENDING)
    if not bases:
        return {}
    pairs = Pairs(name for name in images if not name.lower().endswith(MASK_ENDING))
    ordered = sorted(
        bases, key=lambda name: (name.lower().endswith(MASK_ENDING), bool(pairs.named(bases[name])))
    )
    return {name: owners for name in ordered if (owners := pairs.owners(bases[name]))}


def composed(text: str) -> str:
    """Return a name in the one Unicode form that all are compared in."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)
