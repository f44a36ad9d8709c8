"""Conditional writes: a file is written only if no other process has written it since it was read.

On disk the file is compared and replaced under a lock (flock, which NFS passes to its server). S3 compares the ETag
(If-Match, If-None-Match), Google Cloud Storage the generation. Some S3 servers ignore these headers and some file
systems have no locks; :func:`supports_conditions` finds out.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

from filelock import FileLock, Timeout

from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.storage.disk import atomic_write, explain_errors

ABSENT = ""  # the version of a file that does not exist
PROBE_PREFIX = ".seen-"  # of files that a test of the storage may leave
LOCK_SECONDS = 30.0  # a lock is held for milliseconds, unless the disk is stuck
_CONFLICT_STATUS = {409, 412}  # 409: another conditional request for the same key was in progress


class Conditions(NamedTuple):
    """How one kind of storage reads a file with its version, and writes or removes it if it still has that version.

    The first argument of all is the fsspec file system (None on disk), the second the path or key. ``write`` returns
    whether the file was written.
    """

    read: Callable[[Any, str], tuple[bytes, str]]
    write: Callable[[Any, str, bytes, str], bool]
    remove: Callable[[Any, str, str], None]


class Folder(Protocol):
    """What the probe needs of a :class:`Storage`."""

    @property
    def is_local(self) -> bool:
        """Whether it is on disk."""
        ...

    def path(self, *parts: str) -> str:
        """Return an address in it."""
        ...

    def read_version(self, rel: str) -> tuple[bytes, str]:
        """Read a file with its version."""
        ...

    def write_if(self, rel: str, data: bytes, *, version: str) -> bool:
        """Write a file if it still has a version."""
        ...

    def write_bytes(self, rel: str, data: bytes) -> None:
        """Write a file."""
        ...

    def remove(self, rel: str) -> None:
        """Remove a file."""
        ...


def supports_conditions(folder: Folder) -> bool:
    """Return whether of two conditional writes of one file in a folder exactly one succeeds.

    Writes a probe four times and removes it. Raises StorageError if the folder cannot be written at all.
    """
    name = f"{PROBE_PREFIX}{secrets.token_hex(6)}"
    if folder.is_local:
        with explain_errors("write", path := folder.path(name)), _locked(path) as is_locked:
            return is_locked

    def write(version: str) -> bool:
        return folder.write_if(name, secrets.token_bytes(8), version=version)

    try:
        created = write(ABSENT)
        created_again, replaced_another = write(ABSENT), write('"0123456789abcdef0123456789abcdef"')
        is_honoured = created and not created_again and not replaced_another
        return is_honoured and write(folder.read_version(name)[1])
    except StorageError:
        folder.write_bytes(name, b"")  # raises the error again unless only the condition is refused
        return False
    finally:
        folder.remove(name)


def _read_disk(fs: None, path: str) -> tuple[bytes, str]:
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return b"", ABSENT
    return content, hashlib.sha256(content).hexdigest()


def _write_disk(fs: None, path: str, data: bytes, version: str) -> bool:
    with _locked(path):
        if _read_disk(None, path)[1] != version:
            return False
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            file.write(data)
        return True


def _remove_disk(fs: None, path: str, version: str) -> None:
    with _locked(path):
        if _read_disk(None, path)[1] == version:
            os.unlink(path)


@contextmanager
def _locked(path: str) -> Iterator[bool]:
    """Lock a path by a hidden file beside it; yield False if the file system has no locks.

    The lock file is removed at the end: a process that waits for it notices that, and creates another one.
    """
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    lock_file = os.path.join(folder, lock_name(name))
    lock = FileLock(lock_file, timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout as error:
        raise StorageError(
            f"cannot lock {path}: another process has held {lock_file} for {LOCK_SECONDS:.0f} s; its disk is stuck, or "
            "the process is stopped (kill -CONT PID)"
        ) from error
    except (OSError, NotImplementedError):
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock_file)
        lock.release()


def lock_name(name: str) -> str:
    """Return the name of the lock file of a file that is written by conditional writes on disk."""
    return f".{name}.lock"


def _read_s3(fs: Any, key: str) -> tuple[bytes, str]:
    from fsspec.asyn import sync

    bucket, _, name = key.partition("/")

    async def get() -> tuple[bytes, str]:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=name)
        async with answer["Body"] as body:
            return await body.read(), answer["ETag"]

    try:
        return sync(fs.loop, get)  # type: ignore[no-any-return]
    except FileNotFoundError:
        return b"", ABSENT


def _write_s3(fs: Any, key: str, data: bytes, version: str) -> bool:
    bucket, _, name = key.partition("/")
    condition = {"IfMatch": version} if version else {"IfNoneMatch": "*"}
    try:
        fs.call_s3("put_object", Bucket=bucket, Key=name, Body=data, **condition)
    except FileNotFoundError:
        if not version:  # no such bucket
            raise
        return False
    except Exception as error:
        if _status(error) not in _CONFLICT_STATUS:
            raise
        return _read_s3(fs, key)[0] == data  # the answer to an earlier attempt was lost
    return True


def _remove_s3(fs: Any, key: str, version: str) -> None:
    bucket, _, name = key.partition("/")
    try:
        fs.call_s3("delete_object", Bucket=bucket, Key=name, IfMatch=version)
    except FileNotFoundError:
        return
    except Exception as error:
        if _status(error) not in _CONFLICT_STATUS:
            raise


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of an error of botocore, or of s3fs's translation of one."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    status: int | None = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def _read_gs(fs: Any, key: str) -> tuple[bytes, str]:
    bucket, _, name = key.partition("/")
    try:
        # The version first: if the content is newer than it, a write is refused, and the caller reads again.
        version = str(fs.call("GET", "b/{}/o/{}", bucket, name, json_out=True)["generation"])
        return bytes(fs.cat_file(key)), version
    except FileNotFoundError:
        return b"", ABSENT


def _write_gs(fs: Any, key: str, data: bytes, version: str) -> bool:
    bucket, _, name = key.partition("/")
    try:
        fs.call(
            "POST",
            f"{fs._location}/upload/storage/v1/b/{quote(bucket)}/o",
            uploadType="media",
            name=name,
            ifGenerationMatch=version or "0",
            headers={"Content-Type": "application/octet-stream"},
            data=data,
        )
    except FileNotFoundError:
        if not version:  # no such bucket
            raise
        return False
    except FileExistsError:  # gcsfs's translation of 412
        return _read_gs(fs, key)[0] == data
    return True


def _remove_gs(fs: Any, key: str, version: str) -> None:
    bucket, _, name = key.partition("/")
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        fs.call("DELETE", "b/{}/o/{}", bucket, name, ifGenerationMatch=version)


CONDITIONS = {
    "": Conditions(_read_disk, _write_disk, _remove_disk),
    "s3": Conditions(_read_s3, _write_s3, _remove_s3),
    "gs": Conditions(_read_gs, _write_gs, _remove_gs),
}
