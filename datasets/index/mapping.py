"""Calls a function for many items in parallel: by threads of this process, or in other processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

#: Calls a picklable function for each item, in any process, and yields the results in the order of the items.
Mapper = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]

MOST_THREADS = 32  # for items in buckets, where most of the time is latency


def in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
    """Yield the results of a function for items, in order, computed by threads of this process."""
    far = any("://" in str(getattr(item, "uri", item)) for item in items[:1])
    threads = MOST_THREADS if far else min(MOST_THREADS, 2 * (os.cpu_count() or 1))
    with ThreadPoolExecutor(max(1, min(threads, len(items))), thread_name_prefix="index") as pool:
        yield from pool.map(function, items)
