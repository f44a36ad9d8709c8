"""Crops and scales the images of a folder into another folder, with captions, masks and a manifest of all outputs."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import string
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from PIL import Image

from dreamfleet.datasets.config import CAPTION_EXTENSIONS
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.images.crops import Cut, Cutting, draw_cut, plan_cuts
from dreamfleet.datasets.images.image_formats import MASK_ENDING
from dreamfleet.datasets.images.images import open_with_alpha
from dreamfleet.datasets.images.masks import open_mask
from dreamfleet.datasets.index.caption_files import Captions
from dreamfleet.datasets.index.image_folder import ImageFolder
from dreamfleet.datasets.index.sources import read_mask
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.storage.storage import Storage

log = logging.getLogger(__name__)

MANIFEST = "prepared.json"
SAVED_EVERY = 64  # number of images after which the manifest is written for the first time
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
FIELDS = ("stem", "index", "suffix")


@dataclasses.dataclass(frozen=True)
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
    """One image to prepare: its name, the stem of its outputs, the address of its mask, and its caption."""

    name: str
    stem: str
    mask: str | None
    caption: str | None


def prepare(
    source: str,
    target: str,
    how: Preparing,
    *,
    workers: int = 1,
    caption_extension: Sequence[str] = CAPTION_EXTENSIONS,
    caption_column: str | None = None,
    mask_dir: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Prepare the images of `source` into `target` with `workers` processes, and return the manifest.

    The manifest, `prepared.json` in the target, contains the settings and, for every image, its SHA-256 and its outputs
    or the reason why there are none. Images whose outputs exist for the same content and settings are not processed
    again; outputs of images that no longer exist are removed. Every crop gets its caption as a .txt file and its mask
    as NAME.mask.png.

    Raises DataError if there are no images, if two outputs would have the same name, or if the target is neither empty
    nor the output of an earlier call with the same settings.
    """
    places = Storage(source), Storage(target)
    files = ImageFolder(places[0], caption_extension=caption_extension, mask_dir=mask_dir)
    jobs = _jobs(files, how, caption_column)
    settings = json.loads(json.dumps(dataclasses.asdict(how)))
    before = _earlier(places, settings)
    existing = set(places[1].list("", True))
    known = {name: one for name, one in before.items() if existing.issuperset(files_of(one))}
    entries: dict[str, Any] = dict(before)

    def save() -> dict[str, Any]:
        manifest = {"settings": settings, "pictures": dict(sorted(entries.items()))}
        places[1].write_text(MANIFEST, json_text(manifest, indent=1) + "\n")
        return manifest

    save()
    due = frozenset(save_points(len(jobs)))
    calls = [(places[0], places[1], job, how, known.get(job.name)) for job in jobs]
    for done, (job, entry) in enumerate(zip(jobs, _in_processes(calls, workers), strict=True), 1):
        entries[job.name] = entry
        if done in due:
            save()
        if progress is not None:
            progress(done, len(jobs))
    for name in entries.keys() - {job.name for job in jobs}:
        del entries[name]
    kept = {file for entry in entries.values() for file in files_of(entry)}
    stale = sorted({file for entry in before.values() for file in files_of(entry)} - kept)
    if stale:
        log.info("removed %d files whose images were removed or changed: %s ...", len(stale), stale[0])
    for file in stale:
        places[1].remove(file)
    return save()


def save_points(total: int) -> Iterator[int]:
    """Yield the numbers of images after which the manifest is written; each interval is a sixteenth of the number."""
    done = 0
    while (done := done + max(SAVED_EVERY, done // 16)) < total:
        yield done


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


def files_of(entry: dict[str, Any]) -> list[str]:
    """Return the names of the files that an entry of the manifest records."""
    return [
        output[kind] for output in entry["outputs"] for kind in ("file", "mask", "caption") if kind in output
    ]


def _jobs(files: ImageFolder, how: Preparing, caption_column: str | None) -> list[Job]:
    if not files.images:
        raise DataError(f"no image in {files.storage.url}. Name a folder of images (.png, .jpg, .webp ...)")
    captions = Captions(files, caption_column).of_all(files.images)
    jobs = []
    for number, (name, caption) in enumerate(zip(files.images, captions, strict=True), 1):
        # By default, x.jpg and x.png become x-jpg and x-png.
        pattern = "{stem}-{suffix}" if how.name == "{stem}" and not files.pairs.lone(name) else how.name
        jobs.append(Job(name, name_of(name, number, pattern), files.masks.get(name), caption))
    _refuse_clashes(jobs, how)
    return jobs


def _refuse_clashes(jobs: Sequence[Job], how: Preparing) -> None:
    owners: dict[str, str] = {}
    for job in jobs:
        other = owners.setdefault(_folded(job.stem), job.name)
        if other != job.name:
            raise DataError(
                f"{other} and {job.name} would both become {job.stem}.{how.format}: use a --name that differs, "
                "such as '{stem}-{suffix}' or '{index:05d}'"
            )
    for job in jobs:
        origin = re.sub(r"(-\d+)?(-flip)?$", "", _folded(job.stem))
        other = owners.get(origin, job.name)
        if (how.flip or how.cutting.split) and origin != _folded(job.stem) and other != job.name:
            raise DataError(
                f"{job.name} has the name of a crop or flip of {other}: use another --name, such as '{{index:05d}}'"
            )


def _folded(stem: str) -> str:
    """Return a name normalised as file systems compare it that ignore case and Unicode form."""
    return unicodedata.normalize("NFC", stem).casefold()


def _earlier(places: tuple[Storage, Storage], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest entries of an earlier call with the same target. Raises DataError for other content."""
    source, target = places
    if f"{target.url}/".startswith(f"{source.url}/"):
        raise DataError(f"the output {target.url} is within the input {source.url}. Choose another folder")
    if not target.exists(MANIFEST):
        if target.list("", True):
            raise DataError(
                f"{target.url} is not empty, and its files are not overwritten. Choose another folder"
            )
        return {}
    try:
        manifest = json.loads(target.read_text(MANIFEST))
        before, entries = manifest["settings"], dict(manifest["pictures"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{target.path(MANIFEST)} is broken ({error}). Choose another folder") from error
    if before != settings:
        raise DataError(
            f"{target.url} was prepared with other settings (see {MANIFEST}). Use the same, or another folder"
        )
    return entries


def _in_processes(calls: Sequence[tuple[Any, ...]], workers: int) -> Iterator[dict[str, Any]]:
    workers = min(workers, len(calls))
    if workers <= 1:
        yield from map(_prepare_one, calls)
        return
    # Spawned, because a fork of a process with the threads of a bucket connection would hang.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(_prepare_one, calls, chunksize=4)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _prepare_one(call: tuple[Storage, Storage, Job, Preparing, dict[str, Any] | None]) -> dict[str, Any]:
    source, target, job, how, known = call
    uri = source.path(job.name)
    try:
        data = source.read_bytes(job.name)
        mask = read_mask(job.mask) if job.mask else None
        digest = hashlib.sha256(data)
        for extra in (mask.data if mask else b"", (job.caption or "").encode(), job.stem.encode()):
            digest.update(hashlib.sha256(extra).digest())
        if known is not None and known["sha256"] == digest.hexdigest():
            return known
        entry: dict[str, Any] = {"sha256": digest.hexdigest(), "outputs": []}
        image, weights = open_with_alpha(data, uri=uri)
        if mask is not None:
            weights = open_mask(mask, uri=f"the mask of {uri}")
        elif how.alpha == "white" or (weights is not None and weights.getextrema() == (255, 255)):
            weights = None
    except (DataError, StorageError) as error:
        return {"sha256": "", "outputs": [], "reason": str(error).removeprefix(f"{uri}: ")}
    if weights is not None and weights.size != image.size:
        weights = weights.resize(image.size, Image.Resampling.BILINEAR)
    cuts = plan_cuts(image, how.cutting)
    if not cuts:
        entry["reason"] = f"no size fits its aspect ratio, {image.width}x{image.height}"
    for number, cut in enumerate(cuts, 1):
        for flip in (False, True) if how.flip else (False,):
            stem = job.stem + (f"-{number}" if len(cuts) > 1 else "") + ("-flip" if flip else "")
            entry["outputs"].append(_write(target, stem, image, weights, job.caption, cut, flip, how))
    return entry


def _write(
    target: Storage,
    stem: str,
    image: Image.Image,
    weights: Image.Image | None,
    caption: str | None,
    cut: Cut,
    flip: bool,
    how: Preparing,
) -> dict[str, Any]:
    made: dict[str, Any] = {
        "file": f"{stem}.{how.format}",
        "box": list(cut.box),
        "size": list(cut.canvas),
        "flip": flip,
    }
    made["scale"] = round(cut.size[0] / (cut.box[2] - cut.box[0]), 4)
    if caption:
        made["caption"] = f"{stem}.txt"
        target.write_text(made["caption"], caption + "\n")
    if weights is not None:
        made["mask"] = stem + MASK_ENDING
        target.write_bytes(made["mask"], _encode(draw_cut(weights, cut, "black", flip=flip), "png", 100))
    image = draw_cut(image, cut, how.cutting.fill, flip=flip)
    target.write_bytes(f"{stem}.{how.format}", _encode(image, how.format, how.quality))
    return made


def _encode(image: Image.Image, format: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, FORMATS[format], **({} if format == "png" else {"quality": quality}))
    return buffer.getvalue()
