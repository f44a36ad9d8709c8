"""The coordinator cuts off a member whose machine does not answer, but not all members at once."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection, Listener

import pytest

from dreamfleet.trainers.distributed import coordinator as module
from dreamfleet.trainers.distributed.coordinator import Coordinator
from dreamfleet.trainers.distributed.membership import connect
from dreamfleet.trainers.distributed.roster import Roster
from dreamfleet.trainers.distributed.sockets import probe_peer, unanswered_seconds

KEY = b"key"


@pytest.fixture
def silences(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """The seconds for which the machine of each member has not answered, by the port of the member's socket."""
    silences: dict[int, float] = {}

    def pretended(connection: Connection) -> float:
        with socket.socket(fileno=socket.dup(connection.fileno())) as found:
            return silences.get(found.getpeername()[1], 0.0)

    monkeypatch.setattr(module, "unanswered_seconds", pretended)
    return silences


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    """A coordinator of two members."""
    with Coordinator(Roster(2), key=KEY, silence=4.0) as running:
        yield running


def join(coordinator: Coordinator, name: str) -> tuple[Connection, int]:
    """Join as a member that says once that it lives; return its connection and the port of its socket."""
    connection = connect(coordinator.address, KEY)
    hello = {"kind": "hello", "name": name, "rank": int(name), "host": "127.0.0.1", "port": 1, "expected": 2}
    connection.send_bytes(json.dumps(hello).encode())
    wait_for(lambda: name in coordinator.roster.members)
    with socket.socket(fileno=socket.dup(connection.fileno())) as found:
        return connection, found.getsockname()[1]


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until ``condition``."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def beat(connection: Connection, until: threading.Event) -> None:
    """Send heartbeats until an event is set."""
    while not until.wait(0.5):
        connection.send_bytes(json.dumps({"kind": "alive"}).encode())


def test_a_machine_that_does_not_answer_is_cut_off_while_another_one_answers(
    coordinator: Coordinator, silences: dict[int, float]
) -> None:
    members = [join(coordinator, "0"), join(coordinator, "1")]
    silences[members[0][1]] = module.UNANSWERED_SECONDS + 1
    wait_for(lambda: "0" not in coordinator.roster.members)
    assert coordinator.roster.lost["0"] == "worker 0: its machine has not answered for 9 s"
    assert "1" in coordinator.roster.members


def test_nobody_is_cut_off_when_no_machine_answers(
    coordinator: Coordinator, silences: dict[int, float]
) -> None:
    joined = [join(coordinator, "0"), join(coordinator, "1")]
    silences |= {port: module.UNANSWERED_SECONDS + 1 for _, port in joined}
    ended = threading.Event()
    beats = [threading.Thread(target=beat, args=(connection, ended)) for connection, _ in joined]
    for thread in beats:
        thread.start()
    time.sleep(2.5)  # the coordinator looks each second
    kept = set(coordinator.roster.members)
    ended.set()
    for thread in beats:
        thread.join()
    assert kept == {"0", "1"}
    wait_for(lambda: not coordinator.roster.members)
    assert set(coordinator.roster.lost.values()) == {"worker 0: silent for 4 s", "worker 1: silent for 4 s"}


def test_the_kernel_of_a_process_that_sends_nothing_answers() -> None:
    with Listener(("127.0.0.1", 0)) as listener:
        quiet = Client(listener.address)
        accepted = listener.accept()
        probe_peer(accepted)
        time.sleep(4.5)
        seconds = unanswered_seconds(accepted)
        quiet.close()
        accepted.close()
    assert seconds is not None and seconds < module.ANSWER_SECONDS, "the probes had no answer"
    assert unanswered_seconds(accepted) is None, "the connection is closed"
