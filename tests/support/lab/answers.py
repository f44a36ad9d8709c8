"""The operator's process: reads questions as JSON lines, ``[name, argument, ...]``, and answers each with a line."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

WAIT_SECONDS = 240

T = TypeVar("T")


def wait_for_port(host: str, port: int) -> None:
    """Return when a server listens. Raises RuntimeError after WAIT_SECONDS."""
    _until(lambda: socket.create_connection((host, port), timeout=2).close())


def make_bucket(name: str) -> None:
    """Create a bucket as soon as the S3 server answers."""
    import s3fs

    def make() -> None:
        fs = s3fs.S3FileSystem(skip_instance_cache=True)
        if not fs.exists(name):
            fs.mkdir(name)

    _until(make)


def upload(folder: str, url: str) -> None:
    """Copy a folder into the bucket."""
    from dreamfleet.datasets.storage.storage import Storage

    Storage(url).upload(folder)


def remove(url: str) -> None:
    """Remove a folder of the bucket."""
    from dreamfleet.datasets.storage.storage import Storage

    Storage(url).remove("")


def nodes(address: str) -> list[tuple[str, str]]:
    """Return IP address and id of the living nodes of a Ray cluster."""
    from ray._raylet import GcsClient

    def ask() -> list[tuple[str, str]]:
        found = GcsClient(address=address).get_all_node_info(timeout=20).values()
        return [(node.node_manager_address, node.node_id.hex()) for node in found if node.state == 0]

    return _until(ask)


def last_step(url: str) -> int:
    """Return the step of the newest complete checkpoint of a run; 0 without any."""
    return max(_checkpoints(url).steps(), default=0)


def difference(one: str, other: str) -> float:
    """Return the largest absolute difference between the weights of two runs' last checkpoints; 0 if all is equal.

    The engine's state (optimizer moments, EMA weights) must be equal too for 0. Raises ValueError if the checkpoints
    are of different steps.
    """
    first, second = (_checkpoints(url).load(last_step(url)) for url in (one, other))
    if first.step != second.step:
        raise ValueError(f"the last checkpoints are of steps {first.step} and {second.step}")
    if _equal(first.learned, second.learned) and _equal(first.engine, second.engine):
        return 0.0
    pairs = ((first.learned[name], second.learned[name]) for name in first.learned)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs) or sys.float_info.min


def events(url: str) -> list[dict[str, Any]]:
    """Return the events that a run wrote into its folder."""
    from dreamfleet.datasets.storage.storage import Storage
    from dreamfleet.trainers.report.events import read_events

    return read_events(Storage(url))


def summary(url: str) -> dict[str, Any]:
    """Return the summary that a run wrote at its end; empty without one."""
    from dreamfleet.datasets.storage.storage import Storage

    run = Storage(url)
    return json.loads(run.read_text("summary.json")) if run.exists("summary.json") else {}


def statuses(url: str) -> dict[str, str]:
    """Return the status of each run by its name, from the table of a fleet."""
    import io

    import pyarrow.parquet

    from dreamfleet.datasets.storage.storage import read_uri

    table = pyarrow.parquet.read_table(io.BytesIO(read_uri(url)))
    return dict(zip(table.column("name").to_pylist(), table.column("status").to_pylist(), strict=True))


def trained_elements(url: str) -> int:
    """Return the number of elements in the weights of a run's newest checkpoint."""
    return sum(tensor.numel() for tensor in _checkpoints(url).load(last_step(url)).learned.values())


def _checkpoints(url: str) -> Any:
    from dreamfleet.datasets.storage.storage import Storage
    from dreamfleet.trainers.run.checkpoint import Checkpoints

    return Checkpoints(Storage(url))


def _equal(one: Any, other: Any) -> bool:
    import torch

    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def _until(attempt: Callable[[], T]) -> T:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return attempt()
        except Exception as error:  # not ready yet; the type of error varies
            if time.monotonic() > deadline:
                raise RuntimeError(f"no answer after {WAIT_SECONDS} s: {error}") from error
            time.sleep(0.3)


ANSWERS = (
    wait_for_port,
    make_bucket,
    upload,
    remove,
    nodes,
    last_step,
    difference,
    events,
    summary,
    statuses,
    trained_elements,
)
QUESTIONS: dict[str, Callable[..., Any]] = {answer.__name__: answer for answer in ANSWERS}


def main() -> None:
    """Answer until the input ends; libraries that print go to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, *args = json.loads(line)
        try:
            answer = {"value": QUESTIONS[name](*args)}
        except Exception as error:  # noqa: BLE001 - the error is the answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
