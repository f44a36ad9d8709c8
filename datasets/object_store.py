"""A connection to one bucket of an object store: opened with the machine's own keys, retried, its errors explained."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from dreamfleet.datasets.disk import as_storage_error
from dreamfleet.datasets.errors import StorageError

log = logging.getLogger(__name__)
T = TypeVar("T")

SCHEMES = ("s3", "gs")
ATTEMPTS = 4  # tries of a request, besides those the client library makes by itself
FIRST_WAIT_SECONDS = 0.25  # four times longer after each further failure
_TRANSIENT_ERRNO = {
    errno.EBUSY,  # s3fs's translation of 503 SlowDown
    errno.EREMOTEIO,  # ... of 500 InternalError
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.EPIPE,
    errno.EAGAIN,
}
# By name, so that botocore, aiohttp and gcsfs need not be imported here.
_TRANSIENT_KINDS = {
    "HTTPClientError",
    "ConnectionError",
    "ClientPayloadError",
    "FSTimeoutError",
    "TimeoutError",
}
_KEYLESS_KINDS = {"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError"}


class Bucket:
    """Runs requests against one bucket. Not to be pickled: Storage opens a new one on the other machine."""

    def __init__(self, scheme: str, name: str) -> None:
        self.scheme = scheme
        self.name = name
        self._opened: tuple[int, Any] | None = None

    def run(self, verb: str, path: str, action: Callable[[Any, str], T]) -> T:
        """Give `action(fsspec file system, key)`, tried again while the failure may pass by itself.

        `verb` and `path` are for the message of the StorageError that all other failures become.
        """
        key = path.partition("://")[2]
        wait = FIRST_WAIT_SECONDS
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return action(self.file_system(), key)
            except StorageError:
                raise
            except Exception as error:
                if not _is_transient(error) or attempt == ATTEMPTS:
                    raise self._explain(verb, path, error) from error
                log.warning("cannot %s %s yet (%s): trying again in %.1f s", verb, path, _kind(error), wait)
                time.sleep(wait)
                wait *= 4
        raise AssertionError("unreachable")

    def is_there(self) -> bool:
        """Say whether the bucket itself exists."""
        try:
            self.file_system().ls(self.name, detail=False)
        except FileNotFoundError:
            return False
        return True

    def file_system(self) -> Any:
        """The fsspec file system of this process: its event loop does not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), _open_file_system(self.scheme))
        return self._opened[1]

    def _explain(self, verb: str, path: str, error: Exception) -> StorageError:
        endpoint = _endpoint() if self.scheme == "s3" else None
        where = f" at {endpoint}" if endpoint else ""
        absent = isinstance(error, (FileNotFoundError, PermissionError)) and self._surely_missing()
        if absent:  # some servers deny a write to a bucket that is not there
            return StorageError(
                f"cannot {verb} {path}: bucket {self.name!r} does not exist{where}. "
                "Create it, or correct its name"
            )
        if isinstance(error, FileNotFoundError):
            return StorageError(f"cannot {verb} {path}: it does not exist{where}. Check the name")
        if _is_one_of(error, _KEYLESS_KINDS):
            return StorageError(
                f"cannot {verb} {path}: no access keys found. Set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY (on every machine of the cluster), or give the machines a role"
            )
        if isinstance(error, PermissionError):
            return StorageError(
                f"cannot {verb} {path}: access denied{where}. Check the access keys (wrong or expired?) and "
                "that they may list, read and write this bucket"
            )
        if _is_one_of(error, _TRANSIENT_KINDS) or isinstance(error, (ConnectionError, TimeoutError)):
            return StorageError(
                f"cannot {verb} {path}: no answer{where or ' from the bucket'} ({_kind(error)}). Check "
                "AWS_ENDPOINT_URL and the network"
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return as_storage_error(verb, getattr(error, "filename", None) or path, error)
        return StorageError(f"cannot {verb} {path}: {_kind(error)}: {error}")

    def _surely_missing(self) -> bool:
        try:
            return not self.is_there()
        except Exception as error:  # noqa: BLE001  the first error is the one to tell of
            log.debug("could not look at bucket %s: %s", self.name, _kind(error))
            return False


def parse_address(text: str) -> tuple[str, str]:
    """Split an address into (scheme, whole address); scheme "" and an absolute path for local ones."""
    scheme, separator, rest = text.partition("://")
    if scheme == "file":
        text, separator = rest, ""
    if not separator:
        if not text:
            raise StorageError("empty path: name a folder or a bucket (s3://bucket/prefix)")
        return "", os.path.abspath(os.path.expanduser(text))
    scheme = {"s3a": "s3", "gcs": "gs"}.get(scheme, scheme)
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


def bucket_has(file_system: Any, key: str) -> bool:
    """Say whether a key, or any key below it, is there."""
    try:
        file_system.info(key)
    except FileNotFoundError:
        return False
    return True


def bucket_files(file_system: Any, key: str, recursive: bool) -> list[str]:
    """Names of the objects below a key, relative to it, sorted; FileNotFoundError when there are none."""
    if recursive:
        entries = list(file_system.find(key, detail=True).values())
    else:
        entries = file_system.ls(key, detail=True)
    start = len(key) + 1
    found = (entry["name"] for entry in entries if entry["type"] != "directory")
    return sorted(name[start:] for name in found if name.startswith(f"{key}/") and not name.endswith("/"))


def bucket_folders(file_system: Any, key: str) -> list[str]:
    """Names of the folders directly below a key, sorted; FileNotFoundError when the key is not there."""
    entries = file_system.ls(key, detail=True)
    found = (entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory")
    return sorted(name.rsplit("/", 1)[1] for name in found if name != key)


def bucket_size(file_system: Any, key: str) -> int:
    """Bytes of an object, or of all objects below a key."""
    info = file_system.info(key)
    if info["type"] != "directory":
        return int(info["size"])
    return sum(int(entry["size"]) for entry in file_system.find(key, detail=True).values())


def bucket_environment() -> dict[str, str]:
    """Return what of this process's environment opens buckets, keys among it: for memory alone, never for a log."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _open_file_system(scheme: str) -> Any:
    import fsspec

    if scheme == "gs":
        try:
            return fsspec.filesystem("gs", use_listings_cache=False)
        except ImportError as error:
            raise StorageError("gs:// needs the gcsfs package: pip install gcsfs") from error
    # fsspec keeps one instance per thread and set of arguments: the keys are among the arguments so that a
    # change of the environment is seen.
    return fsspec.filesystem(
        "s3",
        endpoint_url=_endpoint(),
        key=os.environ.get("AWS_ACCESS_KEY_ID"),
        secret=os.environ.get("AWS_SECRET_ACCESS_KEY"),
        token=os.environ.get("AWS_SESSION_TOKEN"),
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": 10,
            "read_timeout": 60,
            "retries": {"max_attempts": 2, "mode": "standard"},
        },
    )


def _is_transient(error: Exception) -> bool:
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return False
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return True
    return _is_one_of(error, _TRANSIENT_KINDS)


def _is_one_of(error: BaseException, names: set[str]) -> bool:
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _kind(error: BaseException) -> str:
    return type(error).__name__
