"""The retry policy for storage requests over the network: which failures are transient, and how long to wait.

It applies to S3, for which botocore and s3fs are configured for one attempt each. Other services are retried only by
their own client, so that attempts never multiply: Google Cloud Storage by gcsfs (6 attempts, not configurable), the
Hugging Face hub by huggingface_hub. aiohttp resends a request immediately if a kept-alive connection was closed. Waits
for Ray jobs, Ray nodes and locks are not requests, and have their own deadlines. Pure functions.
"""

from __future__ import annotations

import errno

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 0.25  # before the second attempt; multiplied by four after each further failure
PATIENCE_SECONDS = 60.0  # no attempt starts later than this after the first failure

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
    """Return the seconds to wait after failed attempt ``attempt`` (counted from 1); None to give up."""
    wait = FIRST_WAIT_SECONDS * 4 ** (attempt - 1)
    return wait if attempt < ATTEMPTS and since_first_failure + wait < PATIENCE_SECONDS else None


def is_transient(error: BaseException) -> bool:
    """Return whether the failure of a request may be temporary: no connection, or no response in time."""
    return is_one_of(error, _TRANSIENT_KINDS)


def is_transient_answer(status: int, code: str | None) -> bool:
    """Return whether a server's response (HTTP status and S3 error code) is a reason to retry."""
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
