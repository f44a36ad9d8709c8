"""Options of `data prepare`, and the names of its outputs."""

from __future__ import annotations

import os
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.images.crops import Cutting
from dreamfleet.datasets.index.file_pairing import Pairs
from dreamfleet.datasets.tools.image_set import ImageSet

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
FIELDS = ("stem", "index", "suffix")


@dataclass(frozen=True)
class Preparing:
    """Options of `data prepare`. `name` is a pattern for output names with {stem}, {index} (from 1) and {suffix}.

    With `flip`, a flipped copy of each output is also written. `alpha`: `mask` writes transparency as a mask file,
    `white` discards it.
    """

    cutting: Cutting
    format: str = "png"
    quality: int = 95
    name: str = "{stem}"
    flip: bool = False
    alpha: str = "mask"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise DataError(f"format {self.format!r} does not exist; use one of {', '.join(FORMATS)}")
        if self.alpha not in ("mask", "white"):
            raise DataError(
                f"alpha {self.alpha!r}: use mask (write transparency as a mask file) or white (drop it)"
            )
        if not 1 <= self.quality <= 100:
            raise DataError(f"quality {self.quality} is not between 1 and 100")
        name_of("a.png", 1, self.name)


class Job(NamedTuple):
    """One image to prepare: its name, URI, the stem of its outputs, its mask's URI, its caption, and its group.

    The outputs of a group are written to one shard, as far as they fit.
    """

    name: str
    uri: str
    stem: str
    mask: str | None
    caption: str | None
    group: int = 0


def name_of(image: str, index: int, pattern: str) -> str:
    """Return the name for an output, in the image's subfolder: `10_cat/a.jpg` and `{index:03d}` give `10_cat/001`."""
    folder, _, file = image.rpartition("/")
    stem, suffix = os.path.splitext(file)
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None]
        if unknown := [field for field in fields if field not in FIELDS]:
            raise DataError(f"name {pattern!r}: {{{unknown[0]}}} does not exist; use {', '.join(FIELDS)}")
        made = pattern.format(stem=stem, index=index, suffix=suffix.lstrip("."))
    except (ValueError, IndexError) as error:
        raise DataError(f"name {pattern!r}: {error}. Write such as '{{stem}}-{{index:05d}}'") from error
    if not made or made.startswith(".") or "/" in made or "\\" in made or "\0" in made:
        raise DataError(f"name {pattern!r} makes {made!r} of {file}, which is no file name")
    return f"{folder}/{made}" if folder else made


def jobs_of(found: ImageSet, how: Preparing, written: Callable[[str], str] = str) -> list[Job]:
    """Return a job for each image; ``written`` returns the name that an output gets from its stem.

    Raises DataError if two outputs would have the same name.
    """
    pairs = Pairs(image.name for image in found.images)
    jobs = []
    for number, image in enumerate(found.images, 1):
        # By default, x.jpg and x.png become x-jpg and x-png.
        pattern = "{stem}-{suffix}" if how.name == "{stem}" and not pairs.lone(image.name) else how.name
        jobs.append(
            Job(image.name, image.uri, name_of(image.name, number, pattern), image.mask, image.caption)
        )
    _refuse_clashes(jobs, how, written)
    return jobs


def _refuse_clashes(jobs: Sequence[Job], how: Preparing, written: Callable[[str], str]) -> None:
    owners: dict[str, str] = {}
    for job in jobs:
        other = owners.setdefault(_folded(written(job.stem)), job.name)
        if other != job.name:
            raise DataError(
                f"{other} and {job.name} would both become {written(job.stem)}.{how.format}: use a --name that "
                "differs, such as '{stem}-{suffix}' or '{index:05d}'"
            )
    for job in jobs:
        stem = _folded(written(job.stem))
        origin = re.sub(r"(-\d+)?(-flip)?$", "", stem)
        other = owners.get(origin, job.name)
        if (how.flip or how.cutting.split) and origin != stem and other != job.name:
            raise DataError(
                f"{job.name} has the name of a crop or flip of {other}: use another --name, such as '{{index:05d}}'"
            )


def _folded(stem: str) -> str:
    """Return a name normalised as file systems compare it that ignore case and Unicode form."""
    return unicodedata.normalize("NFC", stem).casefold()
