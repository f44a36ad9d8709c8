"""Serves a :class:`Roster` to the workers of a run: connections, heartbeats, and detection of members that died.

It runs in a thread of the process that starts the run. A killed worker closes its connection, so its death is known at
once. A machine that lost power or network no longer answers the kernel's probes; a process that is stopped sends no
heartbeats. Messages are JSON; both sides prove that they know the run's key (``multiprocessing.connection``).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing import AuthenticationError
from multiprocessing.connection import (
    Client,
    Connection,
    Listener,
    answer_challenge,
    deliver_challenge,
)
from typing import Any

from dreamfleet.datasets.json_text import json_text
from dreamfleet.trainers.distributed.roster import Generation, Member, Roster
from dreamfleet.trainers.distributed.sockets import (
    PROBE_IDLE_SECONDS,
    PROBE_SECONDS,
    probe_peer,
    unanswered_seconds,
)

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
#: A member that is silent for so long is cut off. A process that is busy in one call of a library may be silent.
SILENCE_SECONDS = 20.0
#: A member whose machine does not answer for so long is cut off, if another member's machine answers meanwhile.
#: Otherwise the network of this machine may be the one that fails, and nobody is cut off before SILENCE_SECONDS.
UNANSWERED_SECONDS = 8.0
ANSWER_SECONDS = PROBE_IDLE_SECONDS + 2 * PROBE_SECONDS  # a machine that answers has done so within this time


class Coordinator:
    """Runs the roster of one run; ``host`` is an address of this machine that all workers reach.

    ``on_change`` is called with each new generation.
    """

    def __init__(
        self,
        roster: Roster,
        *,
        key: bytes,
        host: str = "127.0.0.1",
        silence: float = SILENCE_SECONDS,
        on_change: Callable[[Generation], None] = lambda generation: None,
    ):
        self.roster, self.silence, self.on_change, self._key = roster, silence, on_change, key
        self._listener = Listener((host, 0), backlog=128)
        self.address: tuple[str, int] = (host, self._listener.address[1])
        self._lock = threading.RLock()
        self._connections: dict[str, Connection] = {}
        self._heard: dict[str, float] = {}
        self._observers: list[Connection] = []
        self._announced = 0
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._accept, daemon=True, name="coordinator-accept"),
            threading.Thread(target=self._watch, daemon=True, name="coordinator-watch"),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._closed.set()
        with contextlib.suppress(OSError):
            Client(self.address).close()  # wakes the thread that accepts
        self._listener.close()
        with self._lock:
            for connection in [*self._connections.values(), *self._observers]:
                hang_up(connection)

    def leave(self, rank: int, reason: str) -> None:
        """Let the worker that the launcher numbers ``rank`` leave at the next step boundary."""
        with self._lock:
            for member in [one for one in self.roster.members.values() if one.rank == rank]:
                self._send(self.roster.leave(member.name, reason))

    def restart_member(self, rank: int, why: str) -> None:
        """Cut off the worker that the launcher numbers ``rank``, such as one that hangs, so that it is replaced."""
        with self._lock:
            for member in [one for one in self.roster.members.values() if one.rank == rank]:
                self._remove(member.name, why)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection = self._listener.accept()
            except (OSError, EOFError):
                continue
            threading.Thread(
                target=self._serve, args=(connection,), daemon=True, name="coordinator-serve"
            ).start()

    def _serve(self, connection: Connection) -> None:
        name = ""
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            while True:
                message = json.loads(connection.recv_bytes())
                with self._lock:
                    name = self._handle(message, connection, name)
        except (OSError, EOFError, AuthenticationError, ValueError, KeyError):
            pass
        with self._lock:
            if connection in self._observers:
                self._observers.remove(connection)
            if name and self._connections.get(name) is connection:
                self._remove(name, "its process ended")
        connection.close()

    def _handle(self, message: dict[str, Any], connection: Connection, name: str) -> str:
        """Handle one message of a member; return the member's name."""
        kind, now = message["kind"], time.monotonic()
        if kind == "observe":
            self._observers.append(connection)
            self._show(connection)
            return ""
        if kind == "hello":
            name = message["name"]
            probe_peer(connection)
            self._connections[name] = connection
            self._heard[name] = now
            member = Member(name, message["rank"], message["host"], message["port"])
            self._send(self.roster.join(member, expected=message["expected"], now=now))
            return str(name)
        self._heard[name] = now
        if kind == "ready":
            self._send(self.roster.ready(name, done=message["done"], broken=message["broken"], now=now))
        elif kind == "leave":
            self._send(self.roster.leave(name, message["reason"]))
        elif kind == "restart":
            self.restart_member(message["rank"], message["why"])
        elif kind == "facts":
            self.roster.facts = message["facts"]
        elif kind == "bye":
            if message["completed"]:
                self._connections.pop(name, None)
                self._send(self.roster.complete(name))
            else:
                self._remove(name, message["why"])
        return name

    def _watch(self) -> None:
        """Cut off silent members, and form a start that waited long enough."""
        while not self._closed.wait(min(HEARTBEAT_SECONDS, self.silence / 4)):
            with self._lock:
                now = time.monotonic()
                for name, why in self._find_silent(now).items():
                    if name in self.roster.members:
                        self._remove(name, why)
                    self._heard.pop(name, None)
                self._send(self.roster.form(now=now))

    def _find_silent(self, now: float) -> dict[str, str]:
        """Return the members whose process or machine is silent for too long, each with the reason to cut it off."""
        silent = {
            name: f"silent for {self.silence:.0f} s"
            for name, heard in self._heard.items()
            if now - heard > self.silence
        }
        unanswered = {
            name: seconds
            for name, connection in self._connections.items()
            if (seconds := unanswered_seconds(connection)) is not None
        }
        if any(seconds < ANSWER_SECONDS for seconds in unanswered.values()):
            silent |= {
                name: f"its machine has not answered for {seconds:.0f} s"
                for name, seconds in unanswered.items()
                if seconds > UNANSWERED_SECONDS
            }
        return silent

    def _remove(self, name: str, why: str) -> None:
        self._send(self.roster.remove(name, why, now=time.monotonic()))
        self._heard.pop(name, None)
        if connection := self._connections.pop(name, None):
            hang_up(connection)

    def _send(self, messages: Iterable[tuple[str, dict[str, Any]]]) -> None:
        for name, message in messages:
            connection = self._connections.get(name)
            if connection is not None:
                with contextlib.suppress(OSError, ValueError):  # it died: its thread notices
                    connection.send_bytes(json_text(message).encode())
        current = self.roster.current
        if current is not None and current.number != self._announced:
            self._announced = current.number
            self.on_change(current)
        for observer in list(self._observers):
            self._show(observer)

    def _show(self, observer: Connection) -> None:
        view = {
            "members": {name: member.rank for name, member in self.roster.members.items()},
            "lost": self.roster.lost,
            "generation": self.roster.current.to_dict() if self.roster.current else None,
            "finished": self.roster.finished,
        }
        with contextlib.suppress(OSError, ValueError):
            observer.send_bytes(json_text(view).encode())


def hang_up(connection: Connection) -> None:
    """End a connection; its other side still receives what was sent, and threads that read it return."""
    with contextlib.suppress(OSError, ValueError), socket.socket(fileno=os.dup(connection.fileno())) as found:
        found.shutdown(socket.SHUT_RDWR)
