"""One worker's membership in a run: waits for generations, follows the coordinator, and gives up broken groups."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import (
    Client,
    Connection,
    answer_challenge,
    deliver_challenge,
)
from typing import Any

import torch.distributed as dist

from dreamfleet.datasets.json_text import json_text
from dreamfleet.trainers.distributed.coordinator import HEARTBEAT_SECONDS, hang_up
from dreamfleet.trainers.distributed.process_group import STEP_TIMEOUT, end_group
from dreamfleet.trainers.distributed.roster import NO_STATE, Generation
from dreamfleet.trainers.distributed.sockets import OpenedSockets

log = logging.getLogger(__name__)

# gloo raises plain RuntimeErrors: its messages name the source file, or say what happened to the connection.
_BROKEN = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")


class CutOff(RuntimeError):
    """This worker is no longer a member of its run: the others went on without it. Ray starts a replacement."""


class Left(Exception):
    """This worker left its run by agreement, or joined one that has ended meanwhile."""


class GroupBroke(RuntimeError):
    """A worker was lost, and the engine of this one cannot regroup: all workers start again from a checkpoint."""


def is_broken_group(error: BaseException) -> bool:
    """Return whether an error came from an operation whose peers are gone, not from this worker's own work."""
    if isinstance(error, dist.DistError):  # NCCL's errors, and those of the store
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _BROKEN)


class Membership:
    """A worker's connection to the :class:`~dreamfleet.trainers.distributed.coordinator.Coordinator` of its run.

    ``rank`` is the worker's number at the launcher, ``expected`` the number of workers that it started, ``host`` the
    address at which the other workers reach this one. ``alone`` tells whether a generation is training already: this
    worker then builds its parts by itself and joins.
    """

    def __init__(
        self,
        address: tuple[str, int],
        key: bytes,
        *,
        rank: int,
        expected: int,
        host: str,
        backend: str = "gloo",
    ):
        self.backend, self.name = backend, f"{rank}-{uuid.uuid4().hex[:8]}"
        # Every member offers a store; a generation uses that of its rank 0.
        self._store = dist.TCPStore(host, 0, None, is_master=True, wait_for_workers=False)
        self.generation: Generation | None = None
        self._inbox: queue.Queue[dict[str, Any]] = queue.Queue()
        self._opened: OpenedSockets | None = None
        self._lock, self._sending = threading.Lock(), threading.Lock()
        # The newest generations that are to regroup, and to give up; messages may arrive before the group is open.
        self._regroups, self._aborted = 0, 0
        self._is_leaving = False
        self._cut_off, self._closed = "", threading.Event()
        self._connection = connect(address, key)
        self._send(
            kind="hello", name=self.name, rank=rank, expected=expected, host=host, port=self._store.port
        )
        self._threads = [
            threading.Thread(target=self._receive, daemon=True, name="membership"),
            threading.Thread(target=self._beat, daemon=True, name="membership-heartbeat"),
        ]
        for thread in self._threads:
            thread.start()
        welcome = self._next()
        self.alone: bool = welcome["alone"]
        self.facts: dict[str, Any] = welcome["facts"]
        if welcome["finished"]:
            raise Left("the run is complete")

    def wants_regroup(self) -> bool:
        """Return whether a worker waits to join or to leave at the next step boundary."""
        return self.generation is not None and self._regroups >= self.generation.number

    def next_generation(self, *, done: int | None, broken: bool = False) -> Generation:
        """Leave the present group, wait for the next generation, and open its process group.

        ``done``: the finished steps of the state that this worker holds; None without a state. ``broken``: an operation
        of the present group failed. Raises Left if this worker is to end, CutOff if the others go on without it.
        """
        self.close_group()
        self._send(kind="ready", done=NO_STATE if done is None else done, broken=broken)
        while True:
            message = self._next()
            if message["kind"] == "generation":
                break
            if message["kind"] in ("left", "finished"):
                raise Left(message.get("reason", "the run is complete"))
        del message["kind"]
        self.generation = generation = Generation.from_dict(message)
        if generation.source is not None:
            self.alone = False
        self._open_group(generation)
        return generation

    @property
    def rank(self) -> int:
        """This worker's rank in the present generation."""
        assert self.generation is not None
        return self.generation.members.index(self.name)

    def publish(self, **facts: Any) -> None:
        """Tell the workers that join later what rank 0 decided at the start; they find it in :attr:`facts`."""
        self._send(kind="facts", facts=facts)

    def leave(self, reason: str) -> None:
        """Leave the run at the next step boundary: the others continue with this worker's units."""
        if self._is_leaving:
            return
        self._is_leaving = True
        self._send(kind="leave", reason=reason)

    def restart_member(self, rank: int, why: str) -> None:
        """Cut off the worker that the launcher numbers ``rank``, such as one that hangs, so that it is replaced."""
        self._send(kind="restart", rank=rank, why=why)

    def close_group(self) -> None:
        """Destroy the process group of the present generation; nothing may use it any more."""
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None:
            opened.shut()  # an operation that still waits for a peer would delay the destruction
        end_group()

    def close(self, *, completed: bool = False, why: str = "its training failed") -> None:
        """End the membership; ``completed``: the whole run is complete, else ``why`` this worker ends."""
        if self._closed.is_set():
            return
        with contextlib.suppress(OSError):
            self._send(kind="bye", completed=completed, why=why)
        self._closed.set()
        hang_up(self._connection)
        self.close_group()

    def _open_group(self, generation: Generation) -> None:
        world, rank = len(generation.members), self.rank
        if world == 1:
            return
        with self._lock:
            self._opened = OpenedSockets()
            if self._aborted >= generation.number:
                raise dist.DistError(f"generation {generation.number} was given up before it began")
        store: Any = self._store
        if rank > 0:
            store = dist.TCPStore(
                generation.host, generation.port, None, is_master=False, wait_for_workers=False
            )
        dist.init_process_group(
            self.backend,
            store=dist.PrefixStore(f"generation-{generation.number}", store),
            rank=rank,
            world_size=world,
            timeout=STEP_TIMEOUT,
        )

    def seal_group(self) -> None:
        """End the opening of the present group, once all its connections exist."""
        with self._lock:
            if self._opened is not None:
                self._opened.seal()

    def _abort(self, number: int) -> None:
        """Make the pending operations of generation ``number`` fail, if it is the present one."""
        self._aborted = max(self._aborted, number)
        while True:
            with self._lock:
                opened = self._opened
                if opened is None or self.generation is None or self.generation.number > number:
                    return
                if self.backend != "gloo":
                    for group in list(dist.distributed_c10d._world.pg_map):
                        with contextlib.suppress(RuntimeError):
                            group.abort()
                opened.shut()
                if opened.is_sealed:
                    return
            time.sleep(0.1)  # the group is being opened, and may open further connections

    def _receive(self) -> None:
        try:
            while True:
                message = json.loads(self._connection.recv_bytes())
                kind = message["kind"]
                if kind == "abort":
                    self._start_abort(message["generation"])
                elif kind == "regroup":
                    self._regroups = max(self._regroups, message["generation"])
                elif kind == "lost":
                    self._cut_off = message["why"]
                    break
                else:
                    self._inbox.put(message)
        except (OSError, EOFError, ValueError):
            pass
        if self._closed.is_set():
            return
        self._cut_off = self._cut_off or "the coordinator of the run cannot be reached"
        self._inbox.put({"kind": "cut off"})
        if self.generation is not None:
            self._abort(self.generation.number)

    def _start_abort(self, number: int) -> None:
        threading.Thread(target=self._abort, args=(number,), daemon=True, name="membership-abort").start()

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS):
            try:
                self._send(kind="alive")
            except OSError:
                return

    def _next(self) -> dict[str, Any]:
        message = self._inbox.get()
        if message["kind"] == "cut off":
            raise CutOff(f"this worker was cut off from its run: {self._cut_off}")
        return message

    def _send(self, **message: Any) -> None:
        try:
            with self._sending:
                self._connection.send_bytes(json_text(message).encode())
        except OSError:
            if message["kind"] in ("ready", "hello"):
                raise CutOff(
                    f"this worker was cut off from its run: {self._cut_off or 'no connection'}"
                ) from None
            raise


class Observer:
    """Follows a run's members without being one; ``on_view`` is called, in a thread, with each new state."""

    def __init__(self, address: tuple[str, int], key: bytes, *, on_view: Callable[[dict[str, Any]], None]):
        self._connection, self._on_view = connect(address, key), on_view
        self._connection.send_bytes(json_text({"kind": "observe"}).encode())
        threading.Thread(target=self._follow, daemon=True, name="membership-observer").start()

    def _follow(self) -> None:
        with contextlib.suppress(OSError, EOFError, ValueError):
            while True:
                self._on_view(json.loads(self._connection.recv_bytes()))

    def close(self) -> None:
        """End the connection."""
        hang_up(self._connection)


def connect(address: tuple[str, int], key: bytes) -> Connection:
    """Connect to a coordinator. Raises CutOff if it cannot be reached or has another key."""
    try:
        connection = Client((address[0], address[1]))
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
    except (OSError, EOFError, AuthenticationError) as error:
        raise CutOff(
            f"the coordinator of the run at {address[0]}:{address[1]} cannot be reached: {error}"
        ) from None
    return connection


def own_address(peer: tuple[str, int]) -> str:
    """Return the address of this machine from which it reaches ``peer``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer[0], peer[1]))
        return str(probe.getsockname()[0])
