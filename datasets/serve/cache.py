"""Encodes the images of an index into a latent cache, with a pool of Ray Data actors or in this process.

The encoder is passed as an argument, so this module does not depend on models.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from dreamfleet.datasets.buckets import training_sizes
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError, StorageError, UserError
from dreamfleet.datasets.images.masks import ImageView, cut_for_training
from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.index.sources import read_image_file, read_mask
from dreamfleet.datasets.processing.runner import Stage, run_on_ray
from dreamfleet.datasets.serve.latent_files import Key, LatentCache, write_shard
from dreamfleet.datasets.storage.storage import Storage

SHARD_IMAGES = 256
SHARD_BYTES = 96 * 2**20  # decoded pixels per shard; Ray Data splits blocks larger than 128 MiB
SHARDS_A_WORKER = (
    4  # minimum if there are enough images, so that all workers stay busy and an interruption loses little
)


class Encode(Protocol):
    """The interface of an encoder of cropped images, uint8 [H,W,3] or, with weights, [H,W,4], of any sizes."""

    def __call__(self, cuts: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Return for every image its latents, `mean` and `std` [C,h,w], and with weights also `mask` [1,h,w]."""
        ...


class Job(NamedTuple):
    """One image to encode: the key of its latents (hashes, flip), its size, and the URIs of the image and its mask."""

    sha256: str
    mask_sha256: str
    flip: bool
    width: int
    height: int
    uri: str
    mask: str

    @property
    def key(self) -> Key:
        """The key of the latents."""
        return Key(self.sha256, self.mask_sha256, self.flip)

    @property
    def size(self) -> tuple[int, int]:
        """The width and height in pixels to which the image is cropped."""
        return self.width, self.height


class Done(NamedTuple):
    """The result of a shard: number of images tried and encoded, bytes written, and URI -> reason of bad images."""

    tried: int
    encoded: int
    bytes: int
    bad: dict[str, str]


class Pool(NamedTuple):
    """The encoding actors: number, resources and environment. With `decode_apart`, separate tasks decode the images."""

    actors: int
    resources: Mapping[str, float]
    environment: Mapping[str, str]
    decode_apart: bool


def jobs_of(index: Index, data: DataConfig) -> list[Job]:
    """Return the images of an index to encode, without duplicates, since copies of an image share their latents."""
    masks = [sha256 if data.alpha_mask else None for sha256 in index.column("mask_sha256")]
    every = zip(
        index.column("sha256"), masks, training_sizes(index.sizes(), data), index.column("uri"), index.column("mask"),
        strict=True,
    )  # fmt: skip
    flips = (False, True) if data.random_flip else (False,)
    jobs = [
        Job(sha256, mask_sha256 or "", flip, *size, uri, mask or "" if mask_sha256 else "")
        for sha256, mask_sha256, size, uri, mask in every
        for flip in flips
    ]
    return list({job.key: job for job in jobs}.values())


def missing_from(cache: LatentCache, jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs whose latents a cache does not contain."""
    return [job for job in jobs if not cache.has(job.key, job.size)]


def make_shards(jobs: Sequence[Job], *, workers: int) -> list[list[Job]]:
    """Divide jobs into shards, of which each is written as one file; images of equal size are adjacent."""
    most = min(SHARD_IMAGES, max(8, -(-len(jobs) // (workers * SHARDS_A_WORKER))))
    shards: list[list[Job]] = []
    room = 0
    for job in sorted(jobs, key=lambda job: (job.size, job.key)):
        pixels = 4 * job.width * job.height
        if not shards or len(shards[-1]) == most or pixels > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(job)
        room -= pixels
    return shards


def read_images(batch: Mapping[str, np.ndarray], *, data: DataConfig) -> dict[str, np.ndarray]:
    """Read and crop the images of a shard; return the batch with `pixels` (bytes), `reason` and `failure` added.

    `reason` says why an image could not be decoded, `failure` why a file could not be read; "" otherwise.
    """
    pixels, reasons, failures = [], [], []
    for job in _jobs_in(batch):
        cut, reason, failure = b"", "", ""
        try:
            cut = cut_job(job, data).tobytes()
        except DataError as error:
            reason = str(error).removeprefix(f"{job.uri}: ")
        except StorageError as error:  # returned as data, since Ray would wrap an exception
            failure = str(error)
        pixels.append(cut)
        reasons.append(reason)
        failures.append(failure)
    added = {"pixels": pixels, "reason": reasons, "failure": failures}
    return {**batch, **{name: np.array(values, dtype=object) for name, values in added.items()}}


class ShardWriter:
    """Encodes and writes shards, in this process or as an actor of the pool."""

    def __init__(
        self,
        make_encode: Callable[[], Encode],
        folder: Storage,
        *,
        precision: str,
        read: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]],
    ):
        self.folder, self.precision, self.read = folder, precision, read
        self._failure = ""
        try:
            self._encode = make_encode()
        except UserError as error:  # returned as data, like all errors that a user can fix
            self._failure = str(error)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Encode and write one shard, after decoding it if necessary; return a row per bad image, and at least one."""
        batch = batch if "pixels" in batch else self.read(batch)
        jobs = _jobs_in(batch)
        failure = self._failure or next((text for text in batch["failure"] if text), "")
        bad = {number: str(reason) for number, reason in enumerate(batch["reason"]) if reason}
        good = [number for number in range(len(jobs)) if number not in bad]
        size = 0
        if not failure:
            cuts = [
                np.frombuffer(batch["pixels"][number], np.uint8).reshape(
                    jobs[number].height, jobs[number].width, -1
                )
                for number in good
            ]
            try:
                size = write_shard(
                    self.folder,
                    [(jobs[number].key, jobs[number].size) for number in good],
                    self._encode(cuts),
                    bad=[(jobs[number].key, jobs[number].size, reason) for number, reason in bad.items()],
                    precision=self.precision,
                )
            except UserError as error:  # the cache cannot be written, or a GPU has too little memory
                failure = str(error)
        rows = [("", "")] if not bad else [(jobs[number].uri, reason) for number, reason in bad.items()]
        return {
            "tried": np.array([len(jobs)] + [0] * (len(rows) - 1)),
            "encoded": np.array([len(good)] + [0] * (len(rows) - 1)),
            "bytes": np.array([size] + [0] * (len(rows) - 1)),
            "uri": np.array([uri for uri, _ in rows], dtype=object),
            "reason": np.array([reason for _, reason in rows], dtype=object),
            "failure": np.array([failure] * len(rows), dtype=object),
        }


def encode_shards(
    shards: Sequence[Sequence[Job]],
    folder: Storage,
    make_encode: Callable[[], Encode],
    *,
    data: DataConfig,
    pool: Pool | None = None,
) -> Iterator[Done]:
    """Encode and write shards, in this process or with a pool of actors; yield the result of each as it completes.

    Raises UserError if a file cannot be read, the cache cannot be written or the model cannot be loaded, and RunFailed
    if the pool fails. Shards that were yielded remain in the cache.
    """
    read = functools.partial(read_images, data=data)
    results: Iterable[Mapping[str, np.ndarray]]
    options: dict[str, Any] = {"precision": data.cache_precision, "read": read}
    if pool is None:
        writer = ShardWriter(make_encode, folder, **options)
        results = (writer(_columns(shard)) for shard in shards)
    else:
        results = _on_ray(shards, pool, read, {"make_encode": make_encode, "folder": folder, **options})
    for one in results:
        if failure := next((text for text in one["failure"] if text), ""):
            raise UserError(str(failure))
        bad = {str(uri): str(reason) for uri, reason in zip(one["uri"], one["reason"], strict=True) if uri}
        tried, encoded, size = (int(one[name].sum()) for name in ("tried", "encoded", "bytes"))
        yield Done(tried, encoded, size, bad)


def _on_ray(
    shards: Sequence[Sequence[Job]], pool: Pool, read: Any, options: Mapping[str, Any]
) -> Iterator[Mapping[str, np.ndarray]]:
    tables = [
        pa.table({name: column.tolist() for name, column in _columns(shard).items()}) for shard in shards
    ]
    buckets = not options["folder"].is_local or any("://" in job.uri for shard in shards for job in shard)
    stages = [Stage(lambda: read, {"CPU": 1})] if pool.decode_apart else []
    stages.append(Stage(lambda: ShardWriter(**options), pool.resources, pool.actors))
    yield from run_on_ray(
        tables,
        stages,
        environment=pool.environment,
        buckets=buckets,
        batch_rows=max(map(len, shards)),  # a whole shard
        what="encoding",
    )


def cut_job(job: Job, data: DataConfig) -> np.ndarray:
    """Read and crop one image as in training. Raises StorageError, also if the file changed since it was indexed."""
    content = read_image_file(job.uri)
    mask = read_mask(job.mask) if job.mask else None
    seen = hashlib.sha256(content).hexdigest(), hashlib.sha256(mask.data).hexdigest() if mask else ""
    if seen != (job.sha256, job.mask_sha256):
        raise StorageError(f"{job.uri} changed while it was being encoded. Run `dreamfleet data cache` again")
    view = ImageView(0, None, job.flip, job.size)
    return cut_for_training(content, view, data, uri=job.uri, mask=mask)


def _columns(jobs: Sequence[Job]) -> dict[str, np.ndarray]:
    return {
        name: np.array(column, dtype=None if name in ("flip", "width", "height") else object)
        for name, column in zip(Job._fields, zip(*jobs, strict=True), strict=True)
    }


def _jobs_in(batch: Mapping[str, np.ndarray]) -> list[Job]:
    columns = (batch[name].tolist() for name in Job._fields)
    return [Job(*values) for values in zip(*columns, strict=True)]
