"""Streams images in the order of the batch plan, decoded by Ray Data on the cluster's CPUs, for sets of any size."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Self

import numpy as np

from dreamfleet.datasets.config import MAX_PIXELS
from dreamfleet.datasets.environment import variables_to_send
from dreamfleet.datasets.errors import DataError, ResourceError, StorageError
from dreamfleet.datasets.images.masks import ImageView
from dreamfleet.datasets.images.vision_transform import Fit
from dreamfleet.datasets.index.index import Index
from dreamfleet.datasets.serve.decode_job import decode_batch, decode_one

log = logging.getLogger(__name__)

WINDOW = 1024  # draws per Ray Data execution: enough to hide its start-up time, few enough to fit in memory
ROWS_PER_BLOCK = 16
READY_BYTES = 256 * 2**20  # decoded images in the queue of each worker
POLL_SECONDS = 0.2
STALL_SECONDS = 120.0
CLOSE_SECONDS = 2.0

Decoded = tuple[int, np.ndarray]  # (row in the index, pixels)


class ImageStream(Iterator[np.ndarray]):
    """Iterator over the decoded images of `draws`, which may be infinite, in exactly their order.

    Yields uint8 [H,W,3] or, if `weighted`, [H,W,4] with the fourth channel of cut_image; `row` is the index row of the
    last image. Draws without a size are cropped to `resolution`. With `fit`, images are processed by it instead of
    cropped, to any size. Close the stream, or use it in a `with` statement.

    Each window of `window` draws is one Ray Data execution; the next one starts while images of the previous one are
    still in the queue. Files are read by the tasks that decode them, each with `num_cpus` CPUs. Ray must be running.

    An image that cannot be decoded is reported once in `bad` (URI and reason) and replaced by the next one in index
    order, in this and all later draws; `replaced` counts these draws. Raises StorageError for a file that cannot be
    read, and ResourceError if no image arrives for `stall_seconds` and the cluster has no free CPU.
    """

    def __init__(
        self,
        index: Index,
        draws: Iterable[ImageView],
        *,
        resolution: int | tuple[int, int],
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
        self._uris: list[str] = index.column("uri")
        self._masks: list[str | None] = index.column("mask")
        self._draws = iter(draws)
        self._resolution = (resolution, resolution) if isinstance(resolution, int) else resolution
        self._max_pixels = max_pixels
        self._weighted = weighted
        self._fit = fit
        self._window = window
        self._num_cpus = num_cpus
        self._stall_seconds = stall_seconds
        self._substitutes: dict[int, int] = {}  # row of a bad image -> row of its replacement
        most = queue_length(self._resolution, window)
        self._ready: queue.Queue[Decoded | BaseException | None] = queue.Queue(maxsize=most)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="image-stream", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> np.ndarray:
        item = self._wait()
        if isinstance(item, tuple):
            self.row, pixels = item
            return pixels
        self.close()
        if isinstance(item, BaseException):
            raise item
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead and discard the images in the queue."""
        if not self._stop.is_set():
            self._stop.set()
            # A thread that waits for Ray Data cannot be interrupted. It ends after its window and enqueues nothing.
            self._thread.join(timeout=CLOSE_SECONDS)

    def _wait(self) -> Decoded | BaseException | None:
        waited = 0.0
        while True:
            try:
                return self._ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if self._stop.is_set():
                    return None
            waited += POLL_SECONDS
            if waited >= self._stall_seconds:
                waited = 0.0
                free = _free_cpus()
                if free < self._num_cpus:
                    return ResourceError(
                        f"no image for {self._stall_seconds:.0f} s: decoding needs {self._num_cpus} CPU, and the "
                        f"cluster has {free} free. Reserve fewer for workers (scaling.num_workers, "
                        "scaling.resources_per_worker), or set data.source: resident"
                    )
                log.warning("no image for %.0f s; still waiting", self._stall_seconds)

    # ---- the thread that reads ahead -------------------------------------------------------------------

    def _produce(self) -> None:
        try:
            while not self._stop.is_set() and (window := list(islice(self._draws, self._window))):
                for found in self._decoded(window):
                    if not self._enqueue(found):
                        return
            self._enqueue(None)
        except BaseException as error:  # noqa: BLE001  raised again in the consumer
            self._enqueue(error)

    def _enqueue(self, item: Decoded | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def _decoded(self, window: list[ImageView]) -> Iterator[Decoded]:
        rows = [self._substitutes.get(draw.row, draw.row) for draw in window]
        self.replaced += sum(row != draw.row for row, draw in zip(rows, window, strict=True))
        jobs = [
            self._job(number, row, draw) for number, (row, draw) in enumerate(zip(rows, window, strict=True))
        ]
        given = 0
        for batch in self._batches(jobs):
            names = ("position", "pixels", "height", "error", "failure")
            for position, pixels, height, error, failure in zip(*(batch[n] for n in names), strict=True):
                if failure:
                    raise StorageError(str(failure))
                assert position == given, (position, given)  # guaranteed by preserve_order
                if error:
                    self._note(rows[given], str(error))
                    self.replaced += rows[given] == window[given].row
                    yield self._replacement(rows[given], window[given])
                else:
                    channels = 4 if self._weighted else 3
                    yield rows[given], np.frombuffer(pixels, np.uint8).reshape(height, -1, channels)
                given += 1
        assert given == len(window), (given, len(window))

    def _batches(self, jobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        import ray.data

        logging.getLogger("ray.data._internal.execution").setLevel(
            logging.WARNING
        )  # otherwise it logs a line per window
        blocks = max(1, -(-len(jobs) // ROWS_PER_BLOCK))
        dataset = ray.data.from_items(jobs, override_num_blocks=blocks)
        dataset.context.execution_options.preserve_order = True
        dataset.context.print_on_execution_start = False
        dataset.context.enable_progress_bars = False
        max_pixels, weighted, fit = self._max_pixels, self._weighted, self._fit
        buckets = any("://" in job["uri"] for job in jobs)
        sent = variables_to_send(buckets=True) if buckets else {}

        def decode(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            # A closure, because Ray displays the arguments of a partial and logs runtime environments.
            return decode_batch(batch, max_pixels=max_pixels, weighted=weighted, fit=fit, sent=sent)

        decoded = dataset.map_batches(
            decode,
            batch_size=None,
            batch_format="numpy",
            num_cpus=self._num_cpus,
        )
        yield from decoded.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)

    def _replacement(self, bad_row: int, draw: ImageView) -> Decoded:
        """Return the next decodable image in index order after a bad one, cropped and flipped as in the draw."""
        for step in range(1, len(self._uris)):
            row = (bad_row + step) % len(self._uris)
            if self._uris[row] in self.bad:
                continue
            pixels, error = decode_one(
                self._uris[row],
                draw._replace(size=self._size(draw)),
                mask=self._masks[row],
                max_pixels=self._max_pixels,
                weighted=self._weighted,
                fit=self._fit,
            )
            if pixels is not None:
                self._substitutes[bad_row] = self._substitutes[draw.row] = row
                return row, pixels
            self._note(row, error)
        raise DataError(f"none of the {len(self._uris)} images can be decoded; the last error: {error}")

    def _size(self, draw: ImageView) -> tuple[int, int]:
        return draw.size or self._resolution

    def _job(self, position: int, row: int, draw: ImageView) -> dict[str, Any]:
        (width, height), (x, y) = self._size(draw), draw.crop or (0.0, 0.0)
        return {
            "position": position,
            "uri": self._uris[row],
            "mask": self._masks[row] or "",
            "center": draw.crop is None,
            "x": x,
            "y": y,
            "flip": draw.flip,
            "width": width,
            "height": height,
        }

    def _note(self, row: int, error: str) -> None:
        if self._uris[row] not in self.bad:
            self.bad[self._uris[row]] = error
            log.warning("image left out, the next one is used in its place: %s", error)


def queue_length(size: tuple[int, int], window: int) -> int:
    """Return the maximum queue length for images of a size in pixels: a window, or as many as fit in READY_BYTES."""
    return max(1, min(window, READY_BYTES // (size[0] * size[1] * 4)))


def _free_cpus() -> float:
    import ray

    return float(ray.available_resources().get("CPU", 0.0))
