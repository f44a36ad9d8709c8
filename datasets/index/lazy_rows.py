"""A sequence whose items are made from the rows of an Arrow table when they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

import pyarrow as pa

T = TypeVar("T")
AT_ONCE = 4096  # rows that an iteration converts at once


class LazyRows(Sequence[T], Generic[T]):
    """The rows of a table as items that ``make`` returns for the values of some columns.

    It holds no Python object for a row, so that a million rows cost no more than their table, which may be
    memory-mapped.
    """

    def __init__(self, table: pa.Table, columns: Sequence[str], make: Callable[..., T]) -> None:
        self._table, self._make = table.select(list(columns)), make

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, row: int) -> T: ...

    @overload
    def __getitem__(self, row: slice) -> list[T]: ...

    def __getitem__(self, row: int | slice) -> T | list[T]:
        if isinstance(row, slice):
            return [self[number] for number in range(len(self))[row]]
        number = range(len(self))[row]  # raises IndexError
        return self._make(*(column[number].as_py() for column in self._table.columns))

    def __iter__(self) -> Iterator[T]:
        for batch in self._table.to_batches(max_chunksize=AT_ONCE):
            columns: list[list[Any]] = [column.to_pylist() for column in batch.columns]
            yield from map(self._make, *columns)
