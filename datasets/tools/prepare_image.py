"""Crops and scales one image for `data prepare`, in a worker of the runner."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from PIL import Image

from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.images.crops import Cut, draw_cut, plan_cuts
from dreamfleet.datasets.images.images import open_with_alpha, read_header
from dreamfleet.datasets.images.masks import open_mask
from dreamfleet.datasets.index.sources import read_image_file, read_mask
from dreamfleet.datasets.processing.runner import Row
from dreamfleet.datasets.tools.outputs import Output, Sample
from dreamfleet.datasets.tools.prepare_options import FORMATS, Job, Preparing


class PrepareWork:
    """Prepares batches of jobs into an output; the runner's workers each hold one."""

    def __init__(self, output: Output, how: Preparing) -> None:
        self.output = output
        self.how = how

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Prepare jobs, given as dictionaries; return for each its name and its entry in the manifest."""
        found = []
        for group, members in groupby(map(job_of, rows), key=lambda job: job.group):
            with self.output.open(group) as write:
                found += [{"name": job.name, "entry": self._entry(job, write)} for job in members]
        return found

    def _entry(self, job: Job, write: Callable[[Sample], dict[str, Any]]) -> dict[str, Any]:
        try:
            data, mask = read_job(job)
            samples = list(samples_of(job, data, mask, self.how))
        except (DataError, StorageError) as error:
            return {"sha256": "", "outputs": [], "reason": str(error).removeprefix(f"{job.uri}: ")}
        entry: dict[str, Any] = {"sha256": _digest(job, data, mask), "outputs": []}
        if not samples:
            size = read_header(data, uri=job.uri)
            entry["reason"] = f"no size fits its aspect ratio, {size.width}x{size.height}"
        for sample in samples:
            entry["outputs"].append({**write(sample), **sample.facts})
        return entry


class CheckWork:
    """Compares images with what an earlier call prepared: returns for each job whether its content is the same."""

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Return the name of each job, and whether its ``sha256`` is that of its image, mask, caption and stem."""
        return [{"name": row["name"], "same": self._same(row)} for row in rows]

    def _same(self, row: Row) -> bool:
        job = job_of(row)
        try:
            return _digest(job, *read_job(job)) == row["sha256"]
        except (DataError, StorageError):
            return False


def job_of(row: Row) -> Job:
    """Return the job that a row holds."""
    return Job(*(row[name] for name in Job._fields))


def samples_of(job: Job, data: bytes, mask: Any, how: Preparing) -> Iterator[Sample]:
    """Yield the outputs of one image. Raises DataError if it cannot be decoded."""
    image, weights = open_with_alpha(data, uri=job.uri)
    if mask is not None:
        weights = open_mask(mask, uri=f"the mask of {job.uri}")
    elif how.alpha == "white" or (weights is not None and weights.getextrema() == (255, 255)):
        weights = None
    if weights is not None and weights.size != image.size:
        weights = weights.resize(image.size, Image.Resampling.BILINEAR)
    cuts = plan_cuts(image, how.cutting)
    for number, cut in enumerate(cuts, 1):
        for flip in (False, True) if how.flip else (False,):
            stem = job.stem + (f"-{number}" if len(cuts) > 1 else "") + ("-flip" if flip else "")
            made = draw_cut(image, cut, how.cutting.fill, flip=flip)
            drawn = None
            if weights is not None:
                drawn = _encode(draw_cut(weights, cut, "black", flip=flip), "png", 100)
            encoded = _encode(made, how.format, how.quality)
            yield Sample(stem, how.format, encoded, drawn, job.caption or None, _facts(cut, flip))


def read_job(job: Job) -> tuple[bytes, Any]:
    """Return the content of a job's image, and its mask. Raises StorageError."""
    return read_image_file(job.uri), read_mask(job.mask) if job.mask else None


def _facts(cut: Cut, flip: bool) -> dict[str, Any]:
    scale = round(cut.size[0] / (cut.box[2] - cut.box[0]), 4)
    return {"box": list(cut.box), "size": list(cut.canvas), "flip": flip, "scale": scale}


def _digest(job: Job, data: bytes, mask: Any) -> str:
    digest = hashlib.sha256(data)
    for extra in (mask.data if mask else b"", (job.caption or "").encode(), job.stem.encode()):
        digest.update(hashlib.sha256(extra).digest())
    return digest.hexdigest()


def _encode(image: Image.Image, format: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, FORMATS[format], **({} if format == "png" else {"quality": quality}))
    return buffer.getvalue()
