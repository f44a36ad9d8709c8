"""Streams images in the order of the batch plan, decoded by Ray tasks on the cluster's CPUs, for sets of any size.

These are plain tasks instead of a Ray Data pipeline, since the order and the end of the reading ahead are known here:
a pipeline needs 1 to 3 s to its first image and copies every image into an Arrow block and out of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, Self

import numpy as np

from dreamfleet.datasets.environment import variables_to_send
from dreamfleet.datasets.errors import DataError, ResourceError, StorageError
from dreamfleet.datasets.image_options import MAX_PIXELS
from dreamfleet.datasets.images.masks import ImageView
from dreamfleet.datasets.images.vision_transform import Fit
from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.serve.decode_job import (
    Chunk,
    DecodeJob,
    DecodeOptions,
    Times,
    decode_chunk,
    decode_one,
    keep_freed_memory,
)

log = logging.getLogger(__name__)

WINDOW = 1024  # draws that are read ahead
AHEAD_BYTES = 256 * 2**20  # decoded images of each worker's stream in the object store
CHUNK_BYTES = 24 * 2**20  # decoded images of one task
CHUNK_ROWS, FIRST_ROWS = (
    32,
    8,
)  # images of one task, and of the first tasks, so that the first batch comes soon
POLL_SECONDS = 0.2
STALL_SECONDS = 120.0
#: Why the consumer waits: no CPU is free, a step of decoding takes long, or the result is on its way to this machine.
CAUSES = ("cpu", "read", "decode", "resize", "transport")


class _Pending(NamedTuple):
    """A submitted chunk: the reference of its result, its draws, the rows that are decoded for them, and its bytes."""

    result: Any
    draws: list[ImageView]
    rows: list[int]
    num_bytes: int
    submitted: float


class _Found(NamedTuple):
    draw: ImageView
    row: int
    pixels: np.ndarray | None
    error: str


class ImageStream(Iterator[np.ndarray]):
    """Iterator over the decoded images of `draws`, which may be infinite, in exactly their order.

    Yields uint8 [H,W,3] or, if `weighted`, [H,W,4] with the fourth channel of cut_image, as read-only views of the
    object store; `row` is the index row of the last image. Draws without a size are cropped to `resolution`. With
    `fit`, images are processed by it instead of cropped, to any size. Close the stream, or use it in a `with`
    statement.

    At most `window` draws, and AHEAD_BYTES of decoded images, are read ahead, in chunks. A slow chunk delays its own
    images only: the later ones are decoded meanwhile. Files are read by the tasks that decode them, each with
    `num_cpus` CPUs. Ray must be running.

    An image that cannot be decoded, or whose file is not the one that was indexed, is reported once in `bad` (URI and
    reason) and replaced by the next one in index order, in this and all later draws; `replaced` counts these draws.
    `waits` are the seconds that the consumer has waited, by cause (CAUSES). Raises StorageError for a file that cannot
    be read, and ResourceError if no image arrives for `stall_seconds` and the cluster has no free CPU.
    """

    def __init__(
        self,
        index: Index,
        draws: Iterable[ImageView],
        *,
        resolution: int | tuple[int, int],
        resampling: str,
        max_pixels: int = MAX_PIXELS,
        weighted: bool = False,
        fit: Fit | None = None,
        window: int = WINDOW,
        num_cpus: float = 1.0,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self.bad: dict[str, str] = {}
        self.replaced = 0
        self.row = -1
        self.waits = dict.fromkeys(CAUSES, 0.0)
        self._index, self._draws = index.table, iter(draws)
        self._next_draw: ImageView | None = None
        self._size = (resolution, resolution) if isinstance(resolution, int) else resolution
        self._options = DecodeOptions(resampling, max_pixels, weighted, fit)
        self._window, self._num_cpus, self._stall_seconds = window, num_cpus, stall_seconds
        self._substitutes: dict[int, int] = {}  # row of a bad image -> row of its replacement
        self._pending: deque[_Pending] = deque()
        self._found: deque[_Found] = deque()
        self._submitted = 0
        self._stop = threading.Event()
        self._decode, self._cpus = self._make_task()
        self._read_ahead()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> np.ndarray:
        try:
            if not self._found:
                self._read_ahead()
                if self._stop.is_set() or not self._pending:
                    raise StopIteration
                self._found.extend(self._take(self._pending[0]))
            self.row, pixels = self._usable(self._found.popleft())
            return pixels
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead and discard the images that were not taken; another thread that waits for one ends."""
        import ray

        if not self._stop.is_set():
            self._stop.set()
            with suppress(Exception):  # Ray may have been shut down
                for pending in self._pending:
                    ray.cancel(pending.result, recursive=False)

    # ---- reading ahead ---------------------------------------------------------------------------------

    def _make_task(self) -> tuple[Any, float]:
        """Return the Ray task that decodes a chunk, and the number of CPUs in the cluster."""
        import ray

        if not ray.is_initialized():
            raise ResourceError(
                "a streamed set is decoded by Ray, which scaling.num_workers: 0 does not start. Set it to 1, or "
                "data.source: resident"
            )
        options = self._options
        sent = variables_to_send(buckets=True) if self._uses_network() else {}

        def decode(jobs: list[DecodeJob]) -> Chunk:
            # A closure, because Ray displays the arguments of a task and logs runtime environments.
            keep_freed_memory()
            return decode_chunk(jobs, options, sent=sent)

        return ray.remote(num_cpus=self._num_cpus)(decode), max(1.0, ray.cluster_resources().get("CPU", 1.0))

    def _uses_network(self) -> bool:
        import pyarrow.compute as pc

        return bool(pc.any(pc.match_substring(self._index.column("uri"), "://")).as_py())

    def _read_ahead(self) -> None:
        """Submit chunks until `window` draws or AHEAD_BYTES are read ahead."""
        while not self._stop.is_set():
            waiting = sum(pending.num_bytes for pending in self._pending)
            if sum(len(pending.draws) for pending in self._pending) >= self._window or (
                self._pending and waiting >= AHEAD_BYTES
            ):
                return
            draws, num_bytes = self._next_chunk()
            if not draws:
                return
            rows = [self._substitutes.get(draw.row, draw.row) for draw in draws]
            jobs = [self._job(row, draw) for row, draw in zip(rows, draws, strict=True)]
            self._pending.append(_Pending(self._decode.remote(jobs), draws, rows, num_bytes, time.time()))
            self._submitted += 1

    def _next_chunk(self) -> tuple[list[ImageView], int]:
        """Return the draws of the next chunk, and the bytes of their decoded images."""
        ahead = min(self._window, AHEAD_BYTES // (4 * self._size[0] * self._size[1]))
        most = min(CHUNK_ROWS, max(1, int(ahead // (2 * self._cpus))))  # enough chunks for all CPUs
        if self._submitted < self._cpus:
            most = min(most, FIRST_ROWS)
        draws: list[ImageView] = []
        num_bytes = 0
        while len(draws) < most:
            draw = self._next_draw or next(self._draws, None)
            self._next_draw = None
            if draw is None:
                break
            size = self._decoded_bytes(draw)
            if draws and num_bytes + size > CHUNK_BYTES:
                self._next_draw = draw
                break
            draws.append(draw)
            num_bytes += size
        return draws, num_bytes

    def _decoded_bytes(self, draw: ImageView) -> int:
        width, height = draw.size or self._size
        if self._options.fit is not None:
            width, height = (self._value(name, draw.row) for name in ("width", "height"))
        return width * height * (4 if self._options.weighted else 3)

    def _job(self, row: int, draw: ImageView) -> DecodeJob:
        uri, sha256, mask = (self._value(name, row) for name in ("uri", "sha256", "mask"))
        return DecodeJob(uri, sha256 or "", mask, draw._replace(size=draw.size or self._size))

    def _value(self, column: str, row: int) -> Any:
        return self._index.column(column)[row].as_py()

    # ---- taking results --------------------------------------------------------------------------------

    def _take(self, pending: _Pending) -> Iterator[_Found]:
        """Return the images of the next chunk, after waiting for it."""
        import ray

        before = time.time()
        if not self._wait(pending):
            return iter(())
        chunk: Chunk = ray.get(pending.result)
        self._count_wait(chunk.times, pending.submitted, before, time.time())
        self._pending.popleft()
        if chunk.failure:
            raise StorageError(chunk.failure)
        return map(_Found, pending.draws, pending.rows, chunk.images, chunk.errors)

    def _wait(self, pending: _Pending) -> bool:
        """Wait until a chunk is on this machine; return False if the stream is closed meanwhile."""
        import ray

        began = time.monotonic()
        while not self._stop.is_set():
            if ray.wait([pending.result], timeout=POLL_SECONDS)[0]:
                return True
            if time.monotonic() - began < self._stall_seconds:
                continue
            began = time.monotonic()
            free = float(ray.available_resources().get("CPU", 0.0))
            if free < self._num_cpus:
                raise ResourceError(
                    f"no image for {self._stall_seconds:.0f} s: decoding needs {self._num_cpus} CPU, and the "
                    f"cluster has {free} free. Reserve fewer for workers (scaling.num_workers, "
                    "scaling.resources_per_worker), or set data.source: resident"
                )
            log.warning("no image for %.0f s; still waiting", self._stall_seconds)
        return False

    def _count_wait(self, times: Times, submitted: float, before: float, after: float) -> None:
        """Add a wait from `before` to `after` to the causes, by what happened to the chunk meanwhile."""
        started = min(max(times.started, submitted, before), after)
        ended = min(max(times.ended, started), after)
        self.waits["cpu"] += started - before
        self.waits["transport"] += after - ended
        busy = times.read + times.decode + times.resize
        for name in ("read", "decode", "resize"):
            self.waits[name] += (ended - started) * getattr(times, name) / busy if busy else 0.0

    def _usable(self, found: _Found) -> tuple[int, np.ndarray]:
        """Return the row and the pixels of an image, or of its replacement."""
        row, pixels = found.row, found.pixels
        if pixels is None:
            self._note(row, found.error)
            row, pixels = self._replacement(row, found.draw)
        self.replaced += row != found.draw.row
        return row, pixels

    def _replacement(self, bad_row: int, draw: ImageView) -> tuple[int, np.ndarray]:
        """Return the next decodable image in index order after a bad one, cropped and flipped as in the draw."""
        error, total = self.bad[self._value("uri", bad_row)], self._index.num_rows
        for step in range(1, total):
            row = (bad_row + step) % total
            if self._value("uri", row) in self.bad:
                continue
            pixels, error = decode_one(self._job(row, draw), self._options)
            if pixels is not None:
                self._substitutes[bad_row] = self._substitutes[draw.row] = row
                return row, pixels
            self._note(row, error)
        raise DataError(f"none of the {total} images can be decoded; the last error: {error}")

    def _note(self, row: int, error: str) -> None:
        uri = self._value("uri", row)
        if uri not in self.bad:
            self.bad[uri] = error
            log.warning("image left out, the next one is used in its place: %s", error)
