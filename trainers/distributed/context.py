"""Rank, world size and device of this process, and collective operations on Python objects."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from dreamfleet.datasets.errors import RunFailed, UserError
from dreamfleet.trainers.distributed.device import explain_out_of_memory, with_index

T = TypeVar("T")
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")

# Between steps a rank may wait for another that uploads gigabytes or encodes a hundred thousand images. A rank that
# died is detected much earlier: Ray monitors the processes, and gloo their connections.
WAIT = timedelta(days=1)


class OtherRankFailed(RuntimeError):
    """Another rank raised an error that is not a UserError, and reports it."""


@dataclass(eq=False)
class DistributedContext:
    """Rank, world size and device of this process. Rank and world size change when workers leave or join.

    ``alone``: this process builds its parts to join workers that train already. Its operations then involve no other
    rank, it computes every share itself, and it is not the main rank.

    All ranks must call every method except :meth:`share` together. An error inside :meth:`on_rank_0` or
    :meth:`on_every_rank` is raised on all of them, so that no rank waits for one that failed.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    gpu_share: float = 1.0  # part of the device's memory that this worker may use
    alone: bool = False

    def __post_init__(self) -> None:
        """Add the index to the device."""
        self.device = with_index(self.device)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which logs and writes files."""
        return self.rank == 0 and not self.alone

    def regroup(self, rank: int, world: int) -> None:
        """Continue as ``rank`` of ``world`` in the present default process group; all its ranks call this."""
        self.rank, self.world, self.alone = rank, world, False
        self.__dict__.pop("group", None)
        if world > 1:
            self.group  # noqa: B018 - creates the group, while nothing else waits

    @cached_property
    def group(self) -> Any:
        """The gloo group for waiting and for Python objects: NCCL's watchdog would end ranks that wait long."""
        return dist.new_group(backend="gloo", timeout=WAIT)

    def wait(self) -> None:
        """Wait until every rank has called this."""
        if self.world > 1:
            dist.barrier(group=self.group)

    def on_rank_0(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0; return its result, or raise its error, on every rank."""
        outcome = _try(work) if self.rank == 0 else None
        if self.world > 1:
            packed = [outcome.packed() if outcome is not None else b""]
            dist.broadcast_object_list(packed, src=0, group=self.group)
            if outcome is None:
                outcome = pickle.loads(packed[0])
        assert outcome is not None
        return outcome.result()

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        return self.on_rank_0(lambda: value)

    def on_every_rank(self, work: Callable[[], T]) -> T:
        """Run ``work`` on every rank; return this rank's result, or raise the lowest failed rank's error on all.

        If only some ranks failed, the message of a UserError names the first of them and its host.
        """
        return self._agree(_try(work))

    def generate_on_every_rank(self, work: Generator[Asked, Answer, T]) -> Generator[Asked, Answer, T]:
        """Run the generator ``work`` on every rank; return this rank's result as :meth:`on_every_rank` does."""
        try:
            with explain_out_of_memory():
                outcome = _Outcome((yield from work))
        except Exception as error:  # noqa: BLE001 - raised again on every rank
            outcome = _Outcome(None, error)
        return self._agree(outcome)

    def _agree(self, outcome: _Outcome) -> Any:
        """Return this rank's result, or raise the error of the lowest failed rank on all."""
        if self.world == 1:
            return outcome.result()
        own = None if outcome.error is None else (outcome.packed(), socket.gethostname())
        every = self.gather(own)
        failed = next(((rank, *one) for rank, one in enumerate(every) if one is not None), None)
        if failed is None:
            return outcome.result()
        rank, packed, host = failed
        error = outcome.error if rank == self.rank else pickle.loads(packed).error
        if None in every and isinstance(error, UserError | RunFailed):
            raise type(error)(f"{error} (on rank {rank}, {host})") from outcome.error
        assert error is not None
        raise error

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks in order of rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.group)
        return found

    def all_gather_unique(self, items: Iterable[T]) -> list[T]:
        """Return the items of all ranks, each once, sorted."""
        return sorted({item for part in self.gather(list(items)) for item in part})  # type: ignore[type-var]

    def share(self, count: int) -> range:
        """Return this rank's share of the numbers below ``count``: every ``world``-th."""
        return range(self.rank, count, self.world)

    def collect(self, mine: Sequence[T], *, everywhere: bool = True) -> list[T]:
        """Return the results of all ranks' shares (:meth:`share`) in the order of the numbers.

        Without ``everywhere`` only rank 0 gets them, and the others an empty list.
        """
        if self.world == 1:
            return list(mine)
        parts: list[Any] | None = [None] * self.world
        if everywhere:
            parts = self.gather(list(mine))
        else:
            parts = parts if self.rank == 0 else None
            dist.gather_object(list(mine), parts, dst=0, group=self.group)
        if parts is None:
            return []
        return [parts[number % self.world][number // self.world] for number in range(sum(map(len, parts)))]


class _Outcome(NamedTuple):
    """The value that a function returned, or the error that it raised."""

    value: Any
    error: Exception | None = None

    def result(self) -> Any:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.value

    def packed(self) -> bytes:
        """Pickle the outcome; an error that is neither UserError nor RunFailed becomes OtherRankFailed."""
        if self.error is not None and not isinstance(self.error, UserError | RunFailed):
            error = OtherRankFailed(f"another rank failed: {type(self.error).__name__}: {self.error}")
            return pickle.dumps(_Outcome(None, error))
        return pickle.dumps(self)


def _try(work: Callable[[], Any]) -> _Outcome:
    try:
        with explain_out_of_memory():
            return _Outcome(work())
    except Exception as error:  # noqa: BLE001 - raised again on every rank
        return _Outcome(None, error)
