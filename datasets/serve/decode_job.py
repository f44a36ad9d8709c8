"""Reads and decodes the images of one chunk of an image stream, in a Ray task."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from dreamfleet.datasets.environment import apply_variables
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.image_options import MAX_PIXELS
from dreamfleet.datasets.images.images import open_image
from dreamfleet.datasets.images.masks import ImageView, Mask, cut_opened, open_view
from dreamfleet.datasets.images.vision_transform import Fit
from dreamfleet.datasets.serve.verified_files import VERIFIED, Stamp
from dreamfleet.datasets.storage.object_store import is_address
from dreamfleet.datasets.storage.storage import read_uri

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
KEPT_BYTES = 2**26  # of freed memory
MAPPED_BYTES = 2**25  # arrays of this size or more are not kept: the most that glibc accepts
READERS = 16  # threads that read the files of a chunk from a bucket or over the network


class DecodeJob(NamedTuple):
    """One image to decode: its URI, the hash of the file when it was indexed, the URI of its mask, and its view.

    ``sha256`` is "" if it is unknown, and ``mask`` is None without a mask. The view has a size, unless images are
    processed by a ``fit``.
    """

    uri: str
    sha256: str
    mask: str | None
    view: ImageView


class DecodeOptions(NamedTuple):
    """How the images of a stream are decoded; ``fit``, if any, processes whole images instead of cutting them."""

    resampling: str
    max_pixels: int = MAX_PIXELS
    weighted: bool = False
    fit: Fit | None = None


class Times(NamedTuple):
    """When a chunk was started and finished (seconds since 1970), and the seconds that its steps took."""

    started: float
    ended: float
    read: float
    decode: float
    resize: float


class Chunk(NamedTuple):
    """The decoded images of a chunk: uint8 [H,W,C] each, or None with the reason in ``errors``.

    ``failure`` says why a file could not be read; the chunk then has no images. Errors are returned as data, since Ray
    would wrap an exception.
    """

    images: list[np.ndarray | None]
    errors: list[str]
    failure: str
    times: Times


class _Files(NamedTuple):
    image: bytes
    mask: Mask | None
    failure: str = ""
    stamp: Stamp | None = None  # of the image file, before it was read


@cache
def keep_freed_memory() -> None:
    """Let this process keep the memory of decoded images for the next ones, up to :data:`KEPT_BYTES`.

    By default glibc returns it to the kernel, which maps and clears 2,500 pages for each photo that is decoded at full
    size: a quarter of the time. Other C libraries are left as they are.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def decode_chunk(
    jobs: Sequence[DecodeJob], options: DecodeOptions, *, sent: Mapping[str, str] = MappingProxyType({})
) -> Chunk:
    """Read and decode images, in the order of the jobs. ``sent``: the result of environment.variables_to_send."""
    apply_variables(sent)
    started = time.time()
    seconds = {"read": 0.0, "decode": 0.0, "resize": 0.0}
    images: list[np.ndarray | None] = []
    errors: list[str] = []
    failure = ""
    for job, files in zip(jobs, _read_all(jobs, options, seconds), strict=True):
        if failure := files.failure:
            break
        try:
            images.append(_decode(job, files, options, seconds))
            errors.append("")
        except DataError as error:
            images.append(None)
            errors.append(str(error))
    if failure:
        images, errors = [], []
    return Chunk(images, errors, failure, Times(started, time.time(), **seconds))


def decode_one(job: DecodeJob, options: DecodeOptions) -> tuple[np.ndarray | None, str]:
    """Read and decode one image; return uint8 [H,W,C] and "", or None and why it cannot be used.

    Raises StorageError if the file cannot be read: a failing disk or bucket must not change the training data.
    """
    chunk = decode_chunk([job], options)
    if chunk.failure:
        raise StorageError(chunk.failure)
    return chunk.images[0], chunk.errors[0]


def _read_all(
    jobs: Sequence[DecodeJob], options: DecodeOptions, seconds: dict[str, float]
) -> Iterable[_Files]:
    """Yield the files of each job: from a local disk one by one, from elsewhere by several threads ahead of need."""

    def read(job: DecodeJob) -> _Files:
        return _read(job, with_mask=options.weighted and options.fit is None)

    if not any("://" in job.uri for job in jobs):
        for job in jobs:
            before = time.perf_counter()
            files = read(job)
            seconds["read"] += time.perf_counter() - before
            yield files
        return
    with ThreadPoolExecutor(min(READERS, len(jobs)), thread_name_prefix="read") as pool:
        coming = pool.map(read, jobs)
        for _ in jobs:
            before = time.perf_counter()
            files = next(coming)
            seconds["read"] += time.perf_counter() - before
            yield files


def _read(job: DecodeJob, *, with_mask: bool) -> _Files:
    stamp = VERIFIED.stamp(job.uri)
    try:
        if is_address(job.uri) and not (with_mask and job.mask):
            return _Files(read_uri(job.uri), None, stamp=stamp)
        # Imported here since sources read recipes: without it, the first image of a process comes 0.1 s sooner.
        from dreamfleet.datasets.index.sources import read_image_file, read_mask

        mask = read_mask(job.mask) if with_mask and job.mask else None
        return _Files(read_image_file(job.uri), mask, stamp=stamp)
    except StorageError as error:
        return _Files(b"", None, str(error))


def _decode(job: DecodeJob, files: _Files, options: DecodeOptions, seconds: dict[str, float]) -> np.ndarray:
    """Decode one image from its files. Raises DataError, also if the file is not the one that was indexed."""
    if job.sha256 and not VERIFIED.has_hash(files.image, job.sha256, uri=job.uri, before=files.stamp):
        raise DataError(
            f"{job.uri}: the file was replaced after it was indexed. Start the run again to index the new one"
        )
    before = time.perf_counter()
    if options.fit is not None:
        image = open_image(files.image, uri=job.uri, max_pixels=options.max_pixels)
        decoded = time.perf_counter()
        pixels = np.asarray(options.fit(image).convert("RGB"))
    else:
        assert job.view.size is not None
        opened = open_view(
            files.image,
            uri=job.uri,
            size=job.view.size,
            resampling=options.resampling,
            max_pixels=options.max_pixels,
            weighted=options.weighted,
            mask=files.mask,
        )
        decoded = time.perf_counter()
        pixels = cut_opened(opened, job.view, size=job.view.size, resampling=options.resampling)
    seconds["decode"] += decoded - before
    seconds["resize"] += time.perf_counter() - decoded
    return pixels
