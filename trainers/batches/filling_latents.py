"""Latents that a run encodes when it first needs them, and adds to the cache for its later epochs and other runs."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dreamfleet.datasets.errors import DataError
from dreamfleet.datasets.images.masks import ImageView
from dreamfleet.datasets.index.index import BadFile, Index
from dreamfleet.datasets.plan import Draw
from dreamfleet.datasets.serve.cache import Job
from dreamfleet.datasets.serve.encoding_actors import EncodingActors
from dreamfleet.datasets.serve.latent_files import Key, LatentCache, write_shard
from dreamfleet.trainers.batches.encoding_ahead import WAIT_SECONDS, EncodingAhead
from dreamfleet.trainers.batches.sources import Shown
from dreamfleet.trainers.batches.vae_encoding import encode_all, encode_batch, read_cut
from dreamfleet.trainers.models.family import DiffusionModel

log = logging.getLogger(__name__)

LOOKED_AT = 256  # coming draws that are searched for images to encode in the same batch
SHARD_IMAGES = 64  # images that are written to the cache as one file
READERS = 4  # threads that decode images

Latents = dict[str, np.ndarray]


class _Wanted(NamedTuple):
    """An image to encode: its row, its key in the cache, and whether it is mirrored."""

    row: int
    key: Key
    flip: bool


class FillingLatents:
    """Latents from the cache; missing images are encoded in the order of the coming draws, and added to the cache.

    Images of coming draws fill up each batch of the encoder. ``keeps``: keep all latents in memory, otherwise only
    those that are not written yet. A thread writes the latents, in files of SHARD_IMAGES; a kill loses those of the
    last file. An image that cannot be decoded is replaced by the next one of its size in index order.

    ``start_actors`` starts actors that encode ahead while :meth:`follow` is in effect. What they have not done when it
    is needed is waited for if an actor has it, and encoded here otherwise, with the same result.
    """

    def __init__(
        self,
        cache: LatentCache,
        index: Index,
        shown: Shown,
        model: DiffusionModel,
        *,
        keys: Sequence[Key],
        keeps: bool,
        start_actors: Callable[[], EncodingActors] | None = None,
    ):
        self.cache, self.index, self.shown, self.model, self.keeps = cache, index, shown, model, keeps
        self.waits: dict[str, float] = {"encode": 0.0}
        self._keys = keys
        self._bad: dict[int, str] = {}  # row -> reason
        self._latents: dict[Key, Latents] = {}
        self._unwritten: dict[Key, tuple[int, int]] = {}  # key -> size
        self._coming: Iterator[Draw] = iter(())
        self._ahead: deque[Draw] = deque()  # draws of `follow` that were looked at and not taken
        self._start_actors = start_actors
        self._others: EncodingAhead | None = None
        self._files: tuple[list[str], list[str | None]] = ([], [])  # URIs of images and masks, for actors
        self._open_threads()
        self._written: deque[tuple[Future[int], list[Key]]] = deque()
        self._lock = threading.Lock()

    def _open_threads(self) -> None:
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="decode")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="latents")
        self._is_open = True

    @property
    def bad(self) -> list[BadFile]:
        """Images that could not be decoded so far; others were used in their place."""
        uris = self.index.column("uri") if self._bad else []
        return sorted(
            BadFile(uris[row], reason.removeprefix(f"{uris[row]}: ")) for row, reason in self._bad.items()
        )

    def follow(self, draws: Iterable[Draw]) -> None:
        """Look ahead along these draws; :meth:`take` must then be called for exactly these."""
        with self._lock:
            self._coming, self._ahead = iter(draws), deque()
            if not self._is_open:
                self._open_threads()
            if self._others is not None:
                self._end_others()
            if self._start_actors is not None:
                self._files = self.index.column("uri"), self.index.column("mask")
                self._others = EncodingAhead(self._start_actors(), enough=len(self._keys))

    def take(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Return ``mean`` and ``std`` ``[B, C, h, w]`` of the draws, ``mask`` if weighted, and their index ``rows``."""
        with self._lock:
            self._add_written()
            if self._others is not None:
                self._look_ahead(LOOKED_AT)
                self._use_others(self._others)
            for draw in draws:
                if self._look_ahead(1):
                    assert self._ahead.popleft() == draw, "the plan has another order"
            wanted = [self._find(draw, draws) for draw in draws]
            stored = [one.key for one in wanted if one.key not in self._latents]
            found = dict(zip(stored, self.cache.read(stored), strict=True)) if stored else {}
            if self.keeps:
                self._latents |= found
            values = [self._latents.get(one.key) or found[one.key] for one in wanted]
            if len(self._unwritten) >= SHARD_IMAGES:
                self._write()
        stacked = {name: torch.stack([torch.from_numpy(one[name]) for one in values]) for name in values[0]}
        return {**stacked, "rows": torch.tensor([one.row for one in wanted])}

    def close(self) -> None:
        """Write the latents that are not written yet, and end the actors."""
        if (others := self._others) is not None:
            others.actors.stop()  # another thread may be waiting for them with the lock
        with self._lock:
            if self._others is not None:
                self._use_others(self._others, gives=False)
                self._end_others()
            if self._unwritten:
                self._write()
            self._is_open = False
            self._writer.shutdown(wait=True)
            self._readers.shutdown(wait=False)
            self._add_written()

    # ---- encoding --------------------------------------------------------------------------------------

    def _find(self, draw: Draw, batch: Sequence[Draw]) -> _Wanted:
        """Return the image of a draw, or its replacement, whose latents are then in the cache or in memory."""
        while True:
            wanted = self._wanted(draw)
            if self._has(wanted):
                return wanted
            before = time.monotonic()
            if self._wait_for_others(wanted):
                self.waits["encode"] += time.monotonic() - before
                continue
            size = self.shown.sizes[wanted.row]
            most = encode_batch(size[0] * size[1])
            self._look_ahead(LOOKED_AT)
            together = {wanted.key: wanted}
            for other in (self._wanted(one) for one in [*batch, *self._ahead]):
                if len(together) == most:
                    break
                if self.shown.sizes[other.row] == size and not self._has(other) and not self._is_given(other):
                    together.setdefault(other.key, other)
            self._encode(list(together.values()))
            self.waits["encode"] += time.monotonic() - before

    def _encode(self, images: Sequence[_Wanted]) -> None:
        """Decode and encode images of one size; note those that cannot be decoded."""

        def cut(image: _Wanted) -> np.ndarray | DataError:
            view = ImageView(image.row, None, image.flip, self.shown.sizes[image.row])
            try:
                return read_cut(self.index, view, self.shown.data)
            except DataError as error:
                return error

        good: list[tuple[_Wanted, np.ndarray]] = []
        for image, made in zip(images, self._readers.map(cut, images), strict=True):
            if isinstance(made, DataError):
                self._bad[image.row] = str(made)
                log.warning("image left out, the next one is used in its place: %s", made)
            else:
                good.append((image, made))
        if not good:
            return
        for (image, _), latents in zip(good, encode_all([made for _, made in good], self.model), strict=True):
            self._add(image.key, self.shown.sizes[image.row], latents)

    def _add(self, key: Key, size: tuple[int, int], latents: Latents) -> None:
        self._latents[key] = latents
        self._unwritten[key] = size

    def _wanted(self, draw: Draw) -> _Wanted:
        row, size, total = draw.row, self.shown.sizes[draw.row], len(self._keys)
        if row in self._bad:
            after = ((row + step) % total for step in range(1, total))
            usable = (other for other in after if other not in self._bad and self.shown.sizes[other] == size)
            row = next(usable, -1)
            if row < 0:
                raise DataError(
                    f"none of the images of {size[0]} x {size[1]} pixels can be decoded; for example: "
                    f"{self._bad[draw.row]}"
                )
        flip = self.shown.flips(draw)
        return _Wanted(row, self._keys[row]._replace(flip=flip), flip)

    def _has(self, image: _Wanted) -> bool:
        return self._has_key(image.key, self.shown.sizes[image.row])

    def _has_key(self, key: Key, size: tuple[int, int]) -> bool:
        return key in self._latents or self.cache.has(key, size)

    def _look_ahead(self, count: int) -> bool:
        """Look at up to ``count`` coming draws; return whether there are any."""
        while len(self._ahead) < count and (draw := next(self._coming, None)) is not None:
            self._ahead.append(draw)
            if self._others is not None:
                self._others.add(self._job(self._wanted(draw)))
        return bool(self._ahead)

    # ---- encoding by actors ----------------------------------------------------------------------------

    def _use_others(self, others: EncodingAhead, *, gives: bool = True) -> None:
        """Take what the actors have encoded, and give them the next images; end them if nothing is missing."""
        for job, latents in others.results():
            if not self._has_key(job.key, job.size):
                self._add(job.key, job.size, latents)
        if gives:
            others.give(lambda job: self._has_key(job.key, job.size), is_all=len(self._ahead) < LOOKED_AT)
            if not others.is_needed:
                log.info("the coming images are all encoded: the encoding processes end")
                self._end_others()

    def _wait_for_others(self, image: _Wanted) -> bool:
        """Wait for an image that an actor has; return whether there is something new."""
        if self._others is None or image.key not in self._others:
            return False
        self._others.actors.wait_for(image.key, seconds=WAIT_SECONDS)
        self._use_others(self._others, gives=False)
        return image.key not in self._others

    def _is_given(self, image: _Wanted) -> bool:
        return self._others is not None and image.key in self._others

    def _end_others(self) -> None:
        assert self._others is not None
        self._others.actors.close()
        self._others = None

    def _job(self, image: _Wanted) -> Job:
        uris, masks = self._files
        mask = masks[image.row] or "" if image.key.mask_sha256 else ""
        return Job(*image.key, *self.shown.sizes[image.row], uris[image.row], mask)

    # ---- writing ---------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Write the new latents to the cache, in the background."""
        keys, self._unwritten = list(self._unwritten.items()), {}
        latents, precision = [self._latents[key] for key, _ in keys], self.shown.data.cache_precision
        write = self._writer.submit(
            write_shard, self.cache.folder, keys, latents, bad=[], precision=precision
        )
        self._written.append((write, [key for key, _ in keys]))

    def _add_written(self) -> None:
        """Read written latents from the cache from now on. Raises StorageError if they could not be written."""
        while self._written and self._written[0][0].done():
            write, keys = self._written.popleft()
            write.result()
            self.cache.refresh()
            if not self.keeps:
                for key in keys:
                    del self._latents[key]
