"""Calls a function for many items in parallel: by threads, by processes of this machine, or on a cluster's CPUs.

The index of a set is built by such a mapper: its items are shards, and images to read. The results are those of one
process, in the order of the items.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from dreamfleet.datasets.environment import apply_variables, variables_to_send
from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.processing.connection import is_connected
from dreamfleet.datasets.processing.runner import Workers
from dreamfleet.datasets.storage.object_store import is_address

log = logging.getLogger(__name__)

#: Calls a picklable function for each item, in any process, and yields the results in the order of the items.
Mapper = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]

MOST_THREADS = 32  # for items in buckets, where most of the time is latency
WINDOW = 4096  # items that threads are given at once
READERS = 16  # threads of one task, for the same reason
MANY_IMAGES, MANY_SHARDS = 2000, 4  # fewer items are not worth sending to other processes
CHUNK = 256  # items of one task
CHUNKS_PER_CPU = 8  # at least, so that all CPUs end at nearly the same time
AHEAD = 2  # tasks that wait for each CPU
FREE_SECONDS = 3.0
POLL_SECONDS, STALL_SECONDS = 5.0, 60.0


def in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
    """Yield the results of a function for items, in order, computed by threads of this process."""
    threads = MOST_THREADS if _is_far(items) else min(MOST_THREADS, 2 * (os.cpu_count() or 1))
    with ThreadPoolExecutor(max(1, min(threads, len(items))), thread_name_prefix="index") as pool:
        for start in range(0, len(items), WINDOW):  # since every item that waits costs memory
            yield from pool.map(function, items[start : start + WINDOW])


def in_parallel(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
    """Yield the results of a function for items, in order.

    Many items are computed on the free CPUs of the cluster that this process is connected to, if any, otherwise by
    threads of this process.
    """
    yield from (OnCluster() if is_connected() else in_threads)(function, items)


def mapper_of(workers: Workers) -> Mapper:
    """Return the mapper that uses the workers of a command."""
    if workers.on_ray:
        return OnCluster()
    return InProcesses(workers.count) if workers.count > 1 else in_threads


@dataclass(frozen=True)
class InProcesses:
    """Maps many items by ``count`` processes of this machine, few by threads of this process."""

    count: int

    def __call__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        """Yield the results of a function for items, in order."""
        if _are_few(items):
            yield from in_threads(function, items)
            return
        # Spawned, because a fork of a process with the threads of a bucket connection would hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.count, context) as pool:
            chunks = iter(_chunks(items, self.count))
            waiting = deque(pool.submit(_call, function, one) for one in islice(chunks, AHEAD * self.count))
            try:
                while waiting:
                    yield from waiting.popleft().result()
                    waiting.extend(pool.submit(_call, function, one) for one in islice(chunks, 1))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


@dataclass(frozen=True)
class OnCluster:
    """Maps many items by Ray tasks on the free CPUs of a cluster, few by threads of this process. Ray must be running.

    What another machine cannot see (a local path) is computed here, and so is everything if no CPU is free, as in a
    training whose workers hold all of them.
    """

    def __call__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        """Yield the results of a function for items, in order."""
        import ray

        if _are_few(items) or not _has_free_cpu():
            yield from in_threads(function, items)
            return
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        sent = variables_to_send(buckets=True) if _is_far(items) else {}

        def call(chunk: Sequence[Any]) -> _Answer:
            # A closure, because Ray displays the arguments of a task and logs runtime environments.
            return _call_there(function, chunk, sent)

        yield from _Tasks(ray.remote(num_cpus=1)(call), function).results(_chunks(items, cpus), AHEAD * cpus)


class _Answer(NamedTuple):
    """The results of a task; None if its machine does not see the items, or with the error of one."""

    results: list[Any] | None
    error: UserError | None = None


class _Tasks:
    """Submits chunks to a Ray task, a limited number ahead, and takes their results in order."""

    def __init__(self, task: Any, function: Callable[[Any], Any]) -> None:
        self._task, self._function = task, function
        self._pending: deque[tuple[Any, Sequence[Any]]] = deque()

    def results(self, chunks: Iterable[Sequence[Any]], ahead: int) -> Iterator[Any]:
        import ray

        coming = iter(chunks)
        try:
            self._submit(islice(coming, ahead))
            while self._pending:
                yield from self._take(*self._pending[0])
                self._pending.popleft()
                self._submit(islice(coming, 1))
        finally:
            with suppress(Exception):  # Ray may have been shut down
                for reference, _ in self._pending:
                    ray.cancel(reference)

    def _submit(self, chunks: Iterable[Sequence[Any]]) -> None:
        self._pending.extend((self._task.remote(chunk), chunk) for chunk in chunks)

    def _take(self, reference: Any, chunk: Sequence[Any]) -> list[Any]:
        import ray
        import ray.exceptions

        answer = _Answer(None)
        if self._arrives(reference):
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayError as error:  # its process or machine died
                log.warning("a task of the index failed (%s); computed here", type(error).__name__)
        else:
            ray.cancel(reference)
        if answer.error is not None:
            raise answer.error
        return list(in_threads(self._function, chunk)) if answer.results is None else answer.results

    @staticmethod
    def _arrives(reference: Any) -> bool:
        """Wait for a result; return False if none arrives for some time and no CPU is free any more."""
        import ray

        began = time.monotonic()
        while not ray.wait([reference], timeout=POLL_SECONDS)[0]:
            if time.monotonic() - began >= STALL_SECONDS:
                if ray.available_resources().get("CPU", 0.0) < 1:
                    return False
                began = time.monotonic()
        return True


def _has_free_cpu() -> bool:
    """Return whether the cluster has a free CPU; wait a little, since CPUs become free some time after a task."""
    import ray

    end = time.monotonic() + FREE_SECONDS
    while ray.available_resources().get("CPU", 0.0) < 1:
        if time.monotonic() >= end:
            return False
        time.sleep(0.1)
    return True


def _call_there(function: Callable[[Any], Any], items: Sequence[Any], sent: Mapping[str, str]) -> _Answer:
    """Call a function for items in a task. UserErrors are returned as data, since Ray would wrap an exception."""
    apply_variables(sent)
    if not all(map(_is_seen_here, items)):
        return _Answer(None)
    try:
        return _Answer(_call(function, items))
    except UserError as error:
        return _Answer([], error)


def _call(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    if not _is_far(items):
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(READERS, len(items)), thread_name_prefix="index") as pool:
        return list(pool.map(function, items))


def _chunks(items: Sequence[Any], cpus: int) -> Iterator[Sequence[Any]]:
    size = max(1, min(CHUNK, len(items) // (CHUNKS_PER_CPU * cpus)))
    return (items[start : start + size] for start in range(0, len(items), size))


def _are_few(items: Sequence[Any]) -> bool:
    return len(items) < (MANY_SHARDS if items and isinstance(items[0], str) else MANY_IMAGES)


def _is_far(items: Sequence[Any]) -> bool:
    """Return whether items are read over a network, judging by the first."""
    return any("://" in str(getattr(item, "uri", item)) for item in items[:1])


def _is_seen_here(item: Any) -> bool:
    """Return whether the files of an item are in a bucket, on the web, or certainly on this machine."""
    return all(
        _exists_here(uri)
        for uri in (getattr(item, "uri", item), getattr(item, "mask", None))
        if uri is not None
    )


def _exists_here(uri: str) -> bool:
    scheme, found, rest = uri.removeprefix("file://").partition("://")
    if found and (is_address(uri) or scheme in ("http", "https") or "://" in rest):
        return True
    return os.path.exists(rest.partition("#")[0] if found else scheme)
