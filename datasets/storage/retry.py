"""The retry policy for storage requests over the network: which failures are transient, how long to wait. Pure.

S3 follows it: botocore and s3fs are configured for one attempt each. Other services are retried by their own client
alone, so that attempts never multiply: Google Cloud Storage by gcsfs (6 attempts, which cannot be configured), the
Hugging Face hub by huggingface_hub. aiohttp resends a request at once when a kept-alive connection turns out to be
closed. Waits for Ray jobs, Ray nodes and locks are not requests, and have their own deadlines.
"""

from __future__ import annotations

import errno

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 0.25  # multiplied by four after each further failure
PATIENCE_SECONDS = 60.0  # after the first failure; no attempt begins later

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
    "IncompleteReadError",
}


def next_wait(attempt: int, since_first_failure: float) -> float | None:
    """Return the seconds to wait after failed attempt number ``attempt`` (from 1); None to give up."""
    wait = FIRST_WAIT_SECONDS * 4 ** (attempt - 1)
    return wait if attempt < ATTEMPTS and since_first_failure + wait < PATIENCE_SECONDS else None


def is_transient(error: BaseException) -> bool:
    """Return whether a request failed in a way that may not repeat: no connection, or no answer in time."""
    return is_one_of(error, _TRANSIENT_KINDS)


def is_transient_answer(status: int, code: str | None) -> bool:
    """Return whether a server's answer, an HTTP status and an S3 error code, asks for another attempt."""
    return status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES


def is_broken_off(error: BaseException) -> bool:
    """Return whether an answer broke off, or stalled, after it had begun: the request itself had succeeded."""
    return is_one_of(error, _BROKEN_OFF_KINDS)


def is_one_of(error: BaseException, names: set[str]) -> bool:
    """Return whether the class of an error, or one of its bases, has one of these names."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def kind_of(error: BaseException) -> str:
    """Return the name of an error's class."""
    return type(error).__name__
