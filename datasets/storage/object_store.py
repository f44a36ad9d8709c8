"""A connection to one bucket of an object store, with retries and error messages that name the remedy."""

from __future__ import annotations

import errno
import functools
import logging
import os
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dreamfleet.datasets.environment import masked, variable
from dreamfleet.datasets.errors import RunFailed, StorageError
from dreamfleet.datasets.storage.disk import as_storage_error
from dreamfleet.datasets.storage.retry import (
    OUTAGES,
    TRANSIENT_ERRNO,
    is_broken_off,
    is_one_of,
    is_transient,
    is_transient_answer,
    kind_of,
    next_wait,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

SCHEMES = ("s3", "gs")
_OTHER_NAMES = {"s3a": "s3", "gcs": "gs"}
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 60.0  # timeouts of one attempt
RECHECK_SECONDS = 15.0


@dataclass
class _Guarded:
    """A guarded action; ``outage``: for how many seconds its server had failed when it gave up a request, if it did."""

    outage: float | None = None


_guarded: ContextVar[_Guarded | None] = ContextVar("guarded", default=None)  # fsspec passes it on
_KEYLESS_KINDS = {"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError"}


class Bucket:
    """Runs requests on one bucket. It cannot be pickled; each process opens its own connection with its own keys."""

    def __init__(self, scheme: str, name: str) -> None:
        self.scheme = scheme
        self.name = name
        self._opened: tuple[int, Any] | None = None

    def run(self, verb: str, path: str, action: Callable[[Any, str], T], *, is_guarded: bool = False) -> T:
        """Return `action(fsspec file system, key)`; run it again if a response is interrupted.

        Requests within the action are also retried individually by the same policy (:mod:`retry`), except that those to
        `gs://` are retried by gcsfs. Other failures raise a StorageError whose message names `verb` and `path`.
        ``is_guarded``: the action begins with a check that may raise RunFailed, and is run again, check included, when
        its requests have been retried for RECHECK_SECONDS: a process may be replaced during an outage.
        """
        key, attempt, first_failure = path.partition("://")[2], 0, 0.0
        while True:
            attempt += 1
            guarded = _Guarded() if is_guarded else None
            token = _guarded.set(guarded)
            try:
                result = action(self.file_system(), key)
                OUTAGES.succeeded(self._own_server)
                return result
            except (StorageError, RunFailed):
                raise
            except Exception as error:
                first_failure = first_failure or time.monotonic()
                since = time.monotonic() - first_failure
                # Failed requests to S3 were retried within the action, but not the transfer of a response.
                again = is_broken_off(error)
                if self.scheme == "gs" and is_transient(error):
                    again, since = (
                        True,
                        max(since, OUTAGES.failed(self._own_server, f"{verb}: {kind_of(error)}")),
                    )
                if guarded is not None and guarded.outage is not None:
                    again, since = True, max(since, guarded.outage)
                wait = next_wait(attempt, since)
                if wait is None or not again:
                    raise StorageError(masked(self._explain(verb, path, error))) from error
                log.info("cannot %s %s (%s): retrying in %.1f s", verb, path, kind_of(error), wait)
                time.sleep(wait)
            finally:
                _guarded.reset(token)

    @property
    def _own_server(self) -> str:
        """The name under which failures outside of S3's requests are kept."""
        return f"{self.scheme}://{self.name}"

    def exists(self) -> bool:
        """Return whether the bucket itself exists."""
        try:
            self.file_system().ls(self.name, detail=False)
        except FileNotFoundError:
            return False
        return True

    def file_system(self) -> Any:
        """Return the fsspec file system of this process; created again after a fork (its event loop breaks)."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), _open_file_system(self.scheme))
        return self._opened[1]

    def _explain(self, verb: str, path: str, error: Exception) -> str:
        endpoint = _endpoint() if self.scheme == "s3" else None
        where = f" at {endpoint}" if endpoint else ""
        missing = isinstance(error, (FileNotFoundError, PermissionError)) and self._is_missing()
        if missing:  # some servers report access denied for a write to a missing bucket
            return (
                f"cannot {verb} {path}: bucket {self.name!r} does not exist{where}. "
                "Create it, or correct its name"
            )
        if isinstance(error, FileNotFoundError):
            return f"cannot {verb} {path}: it does not exist{where}. Check the name"
        if is_one_of(error, _KEYLESS_KINDS):
            return (
                f"cannot {verb} {path}: no access keys found. Set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, here (workers receive them), or give the machines a role"
            )
        if isinstance(error, PermissionError):
            return (
                f"cannot {verb} {path}: access denied{where}. Check that the access keys are correct and "
                "not expired, and that they may list, read and write this bucket"
            )
        if is_transient(error) or isinstance(error, (ConnectionError, TimeoutError)):
            return (
                f"cannot {verb} {path}: no answer{where or ' from the bucket'} ({kind_of(error)}). Check "
                "AWS_ENDPOINT_URL and the network"
            )
        if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNO:
            return (
                f"cannot {verb} {path}: the server{where} kept failing ({error}). It is overloaded or broken; try "
                "again later"
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return str(as_storage_error(verb, getattr(error, "filename", None) or path, error))
        return f"cannot {verb} {path}: {kind_of(error)}: {error}"

    def _is_missing(self) -> bool:
        try:
            return not self.exists()
        except Exception as error:  # noqa: BLE001  the first error is the one to report
            log.debug("could not list bucket %s: %s", self.name, kind_of(error))
            return False


def bucket_at(address: str) -> Bucket:
    """Return a connection, which is opened at the first request, to the bucket that an address names."""
    scheme, url = parse_address(address)
    return Bucket(scheme, url.partition("://")[2].split("/", 1)[0])


def is_failing(address: str) -> bool:
    """Return whether the last request to the server of a bucket address failed, and is being tried again."""
    bucket = bucket_at(address)
    return OUTAGES.is_open(_s3_server() if bucket.scheme == "s3" else bucket._own_server)


def is_address(text: str) -> bool:
    """Return whether a text is a local path or a URL with a supported storage scheme."""
    scheme, separator, _ = text.partition("://")
    return not separator or scheme in ("file", *SCHEMES, *_OTHER_NAMES)


def parse_address(text: str) -> tuple[str, str]:
    """Return (scheme, full address) of an address; for a local path, "" and the absolute path. Raises StorageError."""
    scheme, separator, rest = text.partition("://")
    if scheme == "file":
        text, separator = rest, ""
    if not separator:
        if not text:
            raise StorageError("empty path: give a folder or a bucket (s3://bucket/prefix)")
        return "", os.path.abspath(os.path.expanduser(text))
    scheme = _OTHER_NAMES.get(scheme, scheme)
    if scheme not in SCHEMES:
        raise StorageError(f"{scheme}:// is not supported: use a local path, s3:// or gs://")
    bucket = rest.split("/", 1)[0]
    if "@" in bucket or ":" in bucket:
        raise StorageError(
            f"keys inside a {scheme}:// address are not accepted (they would end up in logs): "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS"
        )
    if not bucket:
        raise StorageError(f"{text!r} names no bucket: write {scheme}://bucket/prefix")
    return scheme, f"{scheme}://{rest.rstrip('/')}"


def _endpoint() -> str | None:
    return variable("AWS_ENDPOINT_URL_S3") or variable("AWS_ENDPOINT_URL")


def _open_file_system(scheme: str) -> Any:
    import fsspec

    if scheme == "gs":
        try:
            return fsspec.filesystem("gs", use_listings_cache=False)
        except ImportError as error:
            raise StorageError("gs:// needs the gcsfs package: pip install gcsfs") from error
    # fsspec caches instances by thread and arguments. The keys are arguments, so that a changed environment is used.
    file_system = fsspec.filesystem(
        "s3",
        session=_session(os.getpid(), os.environ.get("AWS_PROFILE")),
        endpoint_url=_endpoint(),
        key=variable("AWS_ACCESS_KEY_ID"),
        secret=variable("AWS_SECRET_ACCESS_KEY"),
        token=variable("AWS_SESSION_TOKEN"),
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": ANSWER_SECONDS,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
        },
    )
    file_system.retries = 1
    return file_system


@functools.cache  # the session is one of the arguments by which fsspec caches instances
def _session(process: int, profile: str | None) -> Any:
    """Open a botocore session whose requests follow the retry policy."""
    from aiobotocore.session import AioSession

    session = AioSession()
    session.register("needs-retry.s3", _needs_retry)
    return session


def _needs_retry(
    *, response: Any, operation: Any, attempts: int, caught_exception: Any, request_dict: Any, **others: Any
) -> float | None:
    """Return the seconds to wait before a request is retried, None to give up; a retry handler of botocore."""
    server = _s3_server()
    if caught_exception is not None:
        reason, transient = kind_of(caught_exception), is_transient(caught_exception)
    else:
        status, code = response[0].status_code, response[1].get("Error", {}).get("Code")
        reason = f"{status} {code}"
        transient = is_transient_answer(status, code, after_outage=OUTAGES.is_open(server))
    if not transient:
        OUTAGES.succeeded(server)
        return None
    now = time.monotonic()
    own = now - request_dict["context"].setdefault("first_failure", now)
    # Of the whole outage: requests that start in it do not wait longer than those that it began with.
    since = max(own, OUTAGES.failed(server, f"{operation.name} {request_dict['url_path']}: {reason}"))
    guarded = _guarded.get()
    if guarded is not None and own >= RECHECK_SECONDS:
        guarded.outage = since
        return None
    return next_wait(attempts, since)


def _s3_server() -> str:
    """Return the host and port of the S3 server, without a login, under which its failures are kept and reported."""
    address = _endpoint()
    return urlsplit(address).netloc.rpartition("@")[2] if address else "s3.amazonaws.com"
