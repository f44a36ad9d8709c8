"""The retry policy for storage requests over the network: which failures are transient, and how long to wait.

It applies to S3, for which botocore and s3fs are configured for one attempt each. Other services are also retried by
their own client: Google Cloud Storage by gcsfs (6 attempts, not configurable), the Hugging Face hub by
huggingface_hub. aiohttp resends a request immediately if a kept-alive connection was closed. Waits for Ray jobs, Ray
nodes and locks are not requests, and have their own deadlines.

A failure is transient or final: a missing file or bucket, wrong keys and denied access are final and raised at once.
Transient failures are retried for PATIENCE_SECONDS, and within a run for its recipe's ``storage.patience``.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dreamfleet.datasets.environment import masked

log = logging.getLogger(__name__)

FIRST_WAIT_SECONDS = 0.25  # before the second attempt; doubled after each further failure
LONGEST_WAIT_SECONDS = 5.0
PATIENCE_SECONDS = 60.0  # outside of runs: no attempt starts later than this after the first failure
REPORT_SECONDS = 60.0  # between two messages about the same outage

TRANSIENT_ERRNO = {
    errno.EBUSY,  # s3fs's translation of 503 SlowDown
    errno.EREMOTEIO,  # s3fs's translation of 500 InternalError
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.EPIPE,
    errno.EAGAIN,
}
_TRANSIENT_STATUS = {429, 500, 502, 503, 504}
_TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "InternalError"}
# A server that is starting knows neither its keys nor its buckets yet, so these are transient after an outage.
_STARTING_STATUS, _STARTING_CODES = {403}, {"NoSuchBucket", "InvalidAccessKeyId", "AccessDenied"}
# Exceptions are recognised by the names of their classes, so that botocore, aiohttp and gcsfs need not be imported.
_TRANSIENT_KINDS = {
    "HTTPClientError",
    "ConnectionError",
    "ClientPayloadError",
    "FSTimeoutError",
    "TimeoutError",
}
_BROKEN_OFF_KINDS = {
    "AioReadTimeoutError",
    "FSTimeoutError",  # fsspec's translation of it
    "ResponseStreamingError",
    "ClientPayloadError",
    "ClientOSError",  # aiohttp's connection reset while it reads a response
    "ServerDisconnectedError",
    "ConnectionResetError",
    "IncompleteReadError",
}

_patience: list[list[float]] = []  # of the runs in this process


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Within this context every storage request of this process is retried for ``seconds``, not PATIENCE_SECONDS.

    Contexts may overlap in any order, as those of several runs in one process: the longest patience applies.
    """
    mine = [seconds]
    _patience.append(mine)
    try:
        yield
    finally:
        _patience[:] = [each for each in _patience if each is not mine]


def current_patience() -> float:
    """Return the seconds for which a request is retried now."""
    return max((each[0] for each in _patience), default=PATIENCE_SECONDS)


def next_wait(attempt: int, since_first_failure: float, *, patience: float | None = None) -> float | None:
    """Return the seconds to wait after failed attempt ``attempt`` (counted from 1); None to give up.

    ``patience``: the seconds after the first failure within which attempts start; None for :func:`current_patience`.
    """
    limit = current_patience() if patience is None else patience
    wait = min(FIRST_WAIT_SECONDS * 2.0 ** min(attempt - 1, 30), LONGEST_WAIT_SECONDS)
    return wait if since_first_failure + wait < limit else None


@dataclass
class Outages:
    """Keeps since when each server has been failing, so that all its requests give up at the same moment.

    ``now`` returns seconds; ``say`` prints a message. The first failure of an outage is reported at once, then one
    message a minute, and its end. Requests of several threads may call it.
    """

    now: Callable[[], float]
    say: Callable[[str], None] = log.warning
    _began: dict[str, float] = field(default_factory=dict)
    _reported: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def failed(self, server: str, reason: str) -> float:
        """Record a transient failure; return the seconds since the server's first failure without a success since."""
        now = self.now()
        with self._lock:
            since = now - self._began.setdefault(server, now)
            is_due = now - self._reported.get(server, now - REPORT_SECONDS) >= REPORT_SECONDS
            if is_due:
                self._reported[server] = now
        if is_due:
            minutes = current_patience() / 60
            self.say(
                f"no success at {masked(server)} for {since:.0f} s ({reason}): trying again, for up to "
                f"{minutes:.3g} minutes in all"
            )
        return since

    def succeeded(self, server: str) -> None:
        """Record that the server answered."""
        if server not in self._began:  # the usual case, without the lock
            return
        now = self.now()
        with self._lock:
            began, reported = self._began.pop(server, now), self._reported.pop(server, None)
        if reported is not None and now - began >= 1.0:
            self.say(f"{masked(server)} answers again, after {now - began:.0f} s")

    def is_open(self, server: str) -> bool:
        """Return whether the last request to a server failed; ``server`` may be the end of its name."""
        return any(name.endswith(server) for name in list(self._began))


#: The outages of all servers that this process uses.
OUTAGES = Outages(time.monotonic)


def is_transient(error: BaseException) -> bool:
    """Return whether the failure of a request may be temporary: no connection, or no response in time."""
    return is_one_of(error, _TRANSIENT_KINDS)


def is_transient_answer(status: int, code: str | None, *, after_outage: bool = False) -> bool:
    """Return whether a server's response (HTTP status and S3 error code) is a reason to retry.

    ``after_outage``: the last request failed, so that the server may be starting and refuse what it does not know yet.
    """
    if after_outage and (status in _STARTING_STATUS or code in _STARTING_CODES):
        return True
    return status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES


def is_broken_off(error: BaseException) -> bool:
    """Return whether a response was interrupted or stalled after it had started, so that the request succeeded."""
    return is_one_of(error, _BROKEN_OFF_KINDS)


def is_one_of(error: BaseException, names: set[str]) -> bool:
    """Return whether the class of an error, or one of its base classes, has one of these names."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def kind_of(error: BaseException) -> str:
    """Return the name of an error's class."""
    return type(error).__name__
