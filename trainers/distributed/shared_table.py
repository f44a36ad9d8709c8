"""Sends a large table from rank 0 to every rank: as a file that the ranks of a machine map into memory together."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import pyarrow as pa

from dreamfleet.trainers.distributed.context import DistributedContext

T = TypeVar("T")
log = logging.getLogger(__name__)

MAPPED_BYTES = 8 * 2**20  # smaller tables are kept in the memory of each process
SENT_AT_ONCE = 16 * 2**20  # bytes


def share_with_table(
    build: Callable[[], T],
    distributed: DistributedContext,
    *,
    table_of: Callable[[T], pa.Table],
    with_table: Callable[[T, pa.Table], T],
) -> T:
    """Build an object with a table on rank 0 and return it on every rank; its table is shared as by share_table."""
    held: list[pa.Table] = []

    def build_without_rows() -> T:
        built = build()
        held.append(table_of(built))
        return with_table(built, held[0].slice(0, 0))

    found = distributed.on_rank_0(build_without_rows)
    table = share_table(held.pop() if held else None, distributed)
    pa.default_memory_pool().release_unused()
    return with_table(found, table)


def share_table(table: pa.Table | None, distributed: DistributedContext) -> pa.Table:
    """Return rank 0's table on every rank; ``table`` is None on the other ranks.

    Of a table of MAPPED_BYTES or more, a process holds in memory only the parts that it reads, and the ranks of a
    machine hold them together. The file is removed before this returns, and exists until the last rank ends.
    """
    path = distributed.on_rank_0(lambda: _write(table))
    if path is None:
        return distributed.on_rank_0(lambda: table)
    everywhere = all(distributed.gather(os.path.exists(path)))
    own = path if everywhere else _receive(path, distributed)
    try:
        mapped = distributed.on_every_rank(lambda: _open(own))
    finally:
        with suppress(OSError):  # another rank of this machine may have removed it
            os.unlink(own)
    return mapped


def _write(table: pa.Table | None) -> str | None:
    """Write a large table into a temporary file; return its path, None for a small one or without space."""
    assert table is not None
    if table.nbytes < MAPPED_BYTES:
        return None
    handle, path = tempfile.mkstemp(prefix="dreamfleet-index-", suffix=".arrow")
    os.close(handle)
    try:
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())
    except OSError as error:
        os.unlink(path)
        log.warning("the index stays in memory, since %s cannot be written: %s", path, error)
        return None
    return path


def _receive(path: str, distributed: DistributedContext) -> str:
    """Return the path of this rank's copy of rank 0's file, which some ranks do not see; all ranks call this."""
    size = distributed.on_rank_0(lambda: os.path.getsize(path))
    with tempfile.NamedTemporaryFile(prefix="dreamfleet-index-", suffix=".arrow", delete=False) as copy:
        for start in range(0, size, SENT_AT_ONCE):
            part = distributed.on_rank_0(lambda start=start: _read(path, start))  # type: ignore[misc]
            copy.write(part)
    if distributed.rank == 0:
        os.unlink(path)
    return copy.name


def _read(path: str, start: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(SENT_AT_ONCE)


def _open(path: str) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(path)).read_all()
