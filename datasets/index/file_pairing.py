"""Matches caption files and masks to images by name: extensions in any case, names in NFC or NFD. Does no I/O."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence

from dreamfleet.datasets.images.image_formats import ATTENTION_ENDING, MASK_ENDING


class Pairs:
    """Finds the images that a caption file or mask belongs to, by name."""

    def __init__(self, images: Iterable[str]):
        self.images = list(images)
        self._exact = frozenset(self.images)
        self._named: dict[str, list[str]] = {}
        self._stems: dict[str, list[str]] = {}
        for image in self.images:
            self._named.setdefault(same_name(image), []).append(image)
            self._stems.setdefault(composed(os.path.splitext(image)[0]), []).append(image)

    def named(self, name: str) -> list[str]:
        """Return the image called ``name``, otherwise those that differ only in Unicode form or extension case."""
        return [name] if name in self._exact else self._named.get(same_name(name), [])

    def owners(self, base: str) -> list[str]:
        """Return the images called ``base``, otherwise those with the stem ``base``: a file `base`.EXT is theirs."""
        return self.named(base) or self._stems.get(composed(base), [])

    def lone(self, image: str) -> bool:
        """Return whether no other image has the same stem."""
        return self.owners(os.path.splitext(image)[0]) == [image]


def same_name(name: str) -> str:
    """Return a name normalised for comparison: composed (NFC), with a lower-case extension."""
    stem, ending = os.path.splitext(name)
    return composed(stem) + ending.lower()


def masks_beside(images: Sequence[str]) -> dict[str, list[str]]:
    """Return the files that are masks of other images: mask -> its images, in ascending order of priority.

    `NAME.mask.png` has priority over the attention map `NAME_att.png`, and a full name over a stem.
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
    """Return a name in composed Unicode form (NFC), for comparisons."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)
