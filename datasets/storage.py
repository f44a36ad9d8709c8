"""List, read and write files on a local disk or in a bucket (s3://, gs://) through one face."""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from dreamfleet.datasets.errors import StorageError

log = logging.getLogger(__name__)
T = TypeVar("T")

BUCKET_SCHEMES = ("s3", "gs")
ATTEMPTS = 4  # tries of a bucket request, besides those the client library makes by itself
FIRST_WAIT_SECONDS = 0.25  # doubled twice over after each failed try
_TEMPORARY = re.compile(r"^\..+\.tmp-[0-9a-f]{12}$")  # our unfinished writes, never listed
_TRANSIENT_ERRNO = {
    errno.EBUSY,
    errno.EREMOTEIO,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.EPIPE,
    errno.EAGAIN,
}
_TRANSIENT_CLIENT_ERRORS = {"HTTPClientError", "ConnectionError", "ClientPayloadError", "FSTimeoutError"}


class Storage:
    """A folder on disk or a prefix in a bucket; every other path is relative to it.

    Local paths are made absolute at once (Ray workers change directory). Buckets are `s3://bucket/prefix`
    and `gs://bucket/prefix`; the S3 endpoint comes from `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`, keys
    from the environment or the machine's role, never from the URL. An instance can be pickled: the
    other machine opens its own connection with its own keys. One writer a file is assumed.

    All methods raise StorageError, which says what to do about it; file-not-found included.
    """

    def __init__(self, url: str | os.PathLike[str] | Storage) -> None:
        text = url.url if isinstance(url, Storage) else os.fspath(url)
        scheme, separator, rest = text.partition("://")
        if text.startswith("file://"):
            text, separator = rest, ""
        if not separator:
            if not text:
                raise StorageError("empty path: name a folder or a bucket (s3://bucket/prefix)")
            self.url = os.path.abspath(os.path.expanduser(text))
            self.scheme = ""
        else:
            scheme = {"s3a": "s3", "gcs": "gs"}.get(scheme, scheme)
            if scheme not in BUCKET_SCHEMES:
                raise StorageError(f"{scheme}:// is not supported: use a local path, s3:// or gs://")
            bucket = rest.split("/", 1)[0]
            if "@" in bucket or ":" in bucket:
                raise StorageError(
                    f"keys inside a {scheme}:// address are not accepted (they would end up in logs): "
                    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS"
                )
            if not bucket:
                raise StorageError(f"{text!r} names no bucket: write {scheme}://bucket/prefix")
            self.url = f"{scheme}://{rest.rstrip('/')}"
            self.scheme = scheme
        self._opened: tuple[int, Any] | None = None
        self._appended: dict[str, str] = {}

    @property
    def is_local(self) -> bool:
        """True for a folder on this machine's file system."""
        return not self.scheme

    def path(self, *parts: str) -> str:
        """Join `parts` to the address of this storage."""
        clean = [part.strip("/") for part in parts if part.strip("/")]
        if self.is_local:
            return os.path.join(self.url, *clean)
        return "/".join([self.url, *clean])

    def child(self, *parts: str) -> Storage:
        """The storage of a folder inside this one."""
        child = Storage(self.path(*parts))
        child._opened = self._opened
        return child

    # ---- look ----------------------------------------------------------------------------------------

    def exists(self, rel: str = "") -> bool:
        """Say whether a file or a folder is there (in a bucket a folder is there when a file is in it)."""
        path = self.path(rel)
        if self.is_local:
            with _explained("look at", path):
                return os.path.exists(path)
        return self._on_bucket("look at", rel, self._bucket_exists)

    def size(self, rel: str = "") -> int:
        """Bytes of a file, or of all files under a folder."""
        if self.is_local:
            path = self.path(rel)
            with _explained("read", path):
                if not os.path.isdir(path):
                    return os.path.getsize(path)
                return sum(
                    os.path.getsize(os.path.join(path, name)) for name in self.child(rel).list("", True)
                )

        def total(fs: Any, key: str) -> int:
            info = fs.info(key)
            if info["type"] != "directory":
                return int(info["size"])
            return sum(int(entry["size"]) for entry in fs.find(key, detail=True).values())

        return self._on_bucket("read", rel, total)

    def list(
        self,
        rel: str = "",
        recursive: bool = False,
        *,
        on_error: Callable[[str, StorageError], None] | None = None,
    ) -> list[str]:
        """Names of the files in a folder, relative to it, sorted, `/` between parts; [] when it is absent.

        Links to folders are followed, loops of them are not. `on_error(folder, error)` gets subfolders that
        cannot be listed; without it they raise StorageError.
        """
        if self.is_local:
            return sorted(_walk(self.path(rel), recursive, on_error))

        def names(fs: Any, key: str) -> list[str]:
            try:
                if recursive:
                    entries = list(fs.find(key, detail=True).values())
                else:
                    entries = fs.ls(key, detail=True)
            except FileNotFoundError:
                if not self._bucket_is_there(fs):
                    raise
                return []
            prefix = key + "/"
            found = [
                entry["name"][len(prefix) :]
                for entry in entries
                if entry["type"] != "directory" and entry["name"].startswith(prefix)
            ]
            return sorted(name for name in found if name and not name.endswith("/"))

        return self._on_bucket("list", rel, names)

    def list_dirs(self, rel: str = "") -> list[str]:
        """Names of the folders directly inside a folder, sorted; [] when it is absent."""
        if self.is_local:
            path = self.path(rel)
            with _explained("list", path):
                if not os.path.isdir(path):
                    return []
                with os.scandir(path) as entries:
                    return sorted(entry.name for entry in entries if entry.is_dir())

        def names(fs: Any, key: str) -> list[str]:
            try:
                entries = fs.ls(key, detail=True)
            except FileNotFoundError:
                if not self._bucket_is_there(fs):
                    raise
                return []
            found = (entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory")
            return sorted(name.rsplit("/", 1)[1] for name in found if name != key)

        return self._on_bucket("list", rel, names)

    # ---- read ----------------------------------------------------------------------------------------

    def read_bytes(self, rel: str = "") -> bytes:
        """Read a whole file."""
        if self.is_local:
            path = self.path(rel)
            with _explained("read", path), open(path, "rb") as file:
                return file.read()
        return self._on_bucket("read", rel, lambda fs, key: bytes(fs.cat_file(key)))

    def read_text(self, rel: str = "") -> str:
        """Read a whole UTF-8 file (a byte order mark is dropped)."""
        data = self.read_bytes(rel)
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise StorageError(
                f"{self.path(rel)} is not UTF-8 text: byte {data[error.start]:#04x} at position {error.start}. "
                "Save it again as UTF-8"
            ) from error

    @contextmanager
    def local_copy(self, rel: str = "") -> Iterator[Path]:
        """Give a local path of a file or folder: itself on disk, else a copy that vanishes afterwards."""
        if self.is_local:
            path = self.path(rel)
            if not os.path.exists(path):
                raise _as_storage_error("read", path, FileNotFoundError(errno.ENOENT, "No such file"))
            yield Path(path)
            return
        with tempfile.TemporaryDirectory(prefix="dreamfleet-") as folder:
            target = Path(folder) / (self.path(rel).rsplit("/", 1)[1])
            self.download(rel, target)
            yield target

    def download(self, rel: str, local_path: str | os.PathLike[str]) -> None:
        """Copy a file or a folder to a local path; each file appears whole or not at all."""
        target = os.path.abspath(os.fspath(local_path))
        if self.is_local:
            source = self.path(rel)
            if os.path.isdir(source):
                for name in self.child(rel).list("", recursive=True):
                    _copy_file(os.path.join(source, name), os.path.join(target, name))
            else:
                _copy_file(source, target)
            return

        def fetch(fs: Any, key: str) -> None:
            if fs.info(key)["type"] != "directory":
                with _appearing(target) as temporary:
                    fs.get_file(key, temporary)
                return
            os.makedirs(target, exist_ok=True)
            for name in self.child(rel).list("", recursive=True):
                with _appearing(os.path.join(target, *name.split("/"))) as temporary:
                    fs.get_file(f"{key}/{name}", temporary)

        self._on_bucket("read", rel, fetch)

    # ---- write ---------------------------------------------------------------------------------------

    def write_bytes(self, rel: str, data: bytes) -> None:
        """Write a whole file: afterwards it is there completely, or as it was before."""
        if self.is_local:
            path = self.path(rel)
            with _explained("write", path), _appearing(path) as temporary, open(temporary, "wb") as file:
                file.write(data)
            return
        self._on_bucket("write", rel, lambda fs, key: fs.pipe_file(key, data))

    def write_text(self, rel: str, text: str) -> None:
        """Write a whole UTF-8 file, atomically as write_bytes does."""
        self.write_bytes(rel, text.encode("utf-8"))
        self._appended.pop(rel, None)

    def append_text(self, rel: str, text: str) -> None:
        """Add text to the end of a file.

        A bucket has no append: the whole object is written again from a kept buffer, so this is for logs of
        a few megabytes with one writer.
        """
        if self.is_local:
            path = self.path(rel)
            with _explained("write", path):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "a", encoding="utf-8", newline="") as file:
                    file.write(text)
            return
        if rel not in self._appended:
            self._appended[rel] = self.read_text(rel) if self.exists(rel) else ""
        whole = self._appended[rel] + text
        self.write_bytes(rel, whole.encode("utf-8"))
        self._appended[rel] = whole

    @contextmanager
    def staging(self, rel: str) -> Iterator[Path]:
        """Give a local path to write a large file to; it takes its place in the storage at the end.

        When the block raises, nothing is left behind and what was there before stays.
        """
        if self.is_local:
            path = self.path(rel)
            with _explained("write", path), _appearing(path) as temporary:
                yield Path(temporary)
            return
        with tempfile.TemporaryDirectory(prefix="dreamfleet-") as folder:
            temporary_file = Path(folder) / rel.rsplit("/", 1)[-1]
            with _explained("write", str(temporary_file)):
                yield temporary_file
            self.upload(temporary_file, rel)

    def upload(self, local_path: str | os.PathLike[str], rel: str = "") -> None:
        """Copy a local file or folder into the storage; each file appears whole or not at all."""
        source = os.path.abspath(os.fspath(local_path))
        if os.path.isdir(source):
            for name in Storage(source).list("", recursive=True):
                self.upload(os.path.join(source, name), "/".join(part for part in (rel, name) if part))
            return
        if self.is_local:
            _copy_file(source, self.path(rel))
            return
        if not os.path.exists(source):
            raise _as_storage_error("read", source, FileNotFoundError(errno.ENOENT, "No such file"))
        self._on_bucket("write", rel, lambda fs, key: fs.put_file(source, key))

    def remove(self, rel: str) -> None:
        """Remove a file or a whole folder; what is not there needs no removing."""
        self._appended.pop(rel, None)
        if self.is_local:
            path = self.path(rel)
            with _explained("remove", path):
                if os.path.isdir(path) and not os.path.islink(path):
                    shutil.rmtree(path)
                elif os.path.lexists(path):
                    os.unlink(path)
            return

        def drop(fs: Any, key: str) -> None:
            try:
                fs.rm(key, recursive=True)
            except FileNotFoundError:
                if not self._bucket_is_there(fs):
                    raise

        self._on_bucket("remove", rel, drop)

    # ---- inside --------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "scheme": self.scheme}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.url = state["url"]
        self.scheme = state["scheme"]
        self._opened = None
        self._appended = {}

    def _fs(self) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():  # fsspec's loop does not survive a fork
            self._opened = (os.getpid(), _open_file_system(self.scheme))
        return self._opened[1]

    def _bucket(self) -> str:
        return self.url.partition("://")[2].split("/", 1)[0]

    def _bucket_is_there(self, fs: Any) -> bool:
        try:
            fs.ls(self._bucket(), detail=False)
        except FileNotFoundError:
            return False
        return True

    @staticmethod
    def _bucket_exists(fs: Any, key: str) -> bool:
        try:
            fs.info(key)
        except FileNotFoundError:
            return False
        return True

    def _on_bucket(self, verb: str, rel: str, action: Callable[[Any, str], T]) -> T:
        """Run `action(file system, key)`, again after short waits while the error may pass by itself."""
        path = self.path(rel)
        key = path.partition("://")[2]
        wait = FIRST_WAIT_SECONDS
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return action(self._fs(), key)
            except StorageError:
                raise
            except Exception as error:  # client libraries raise their own families: sorted out below
                if not _is_transient(error) or attempt == ATTEMPTS:
                    raise self._as_bucket_error(verb, path, error) from error
                log.warning("cannot %s %s yet (%s): trying again in %.1f s", verb, path, _name(error), wait)
                time.sleep(wait)
                wait *= 4
        raise AssertionError("unreachable")

    def _as_bucket_error(self, verb: str, path: str, error: Exception) -> StorageError:
        names = {kind.__name__ for kind in type(error).__mro__}
        endpoint = _endpoint() if self.scheme == "s3" else None
        where = f" at {endpoint}" if endpoint else ""
        if isinstance(error, FileNotFoundError):
            missing_bucket = False
            try:
                missing_bucket = not self._bucket_is_there(self._fs())
            except Exception as second:  # the first error is the one to tell of
                log.debug("could not look at the bucket: %s", _name(second))
            if missing_bucket:
                return StorageError(
                    f"cannot {verb} {path}: bucket {self._bucket()!r} does not exist{where}. "
                    "Create it, or correct its name"
                )
            return StorageError(f"cannot {verb} {path}: it does not exist{where}. Check the name")
        if names & {"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError"}:
            return StorageError(
                f"cannot {verb} {path}: no access keys found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
                "(on every machine of the cluster), or give the machines a role"
            )
        if isinstance(error, PermissionError):
            return StorageError(
                f"cannot {verb} {path}: access denied{where}. Check the access keys (wrong or expired?) and "
                "that they may list, read and write this bucket"
            )
        if names & _TRANSIENT_CLIENT_ERRORS or isinstance(error, (ConnectionError, TimeoutError)):
            return StorageError(
                f"cannot {verb} {path}: no answer{where or ' from the bucket'} ({_name(error)}). Check "
                "AWS_ENDPOINT_URL and the network"
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _as_storage_error(verb, getattr(error, "filename", None) or path, error)
        return StorageError(f"cannot {verb} {path}: {_name(error)}: {error}")


def read_uri(uri: str) -> bytes:
    """Read the file at an absolute local path or bucket address; StorageError as Storage gives it."""
    folder, _, name = uri.rpartition("/")
    return Storage(folder or "/").read_bytes(name)


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
            "retries": {"max_attempts": 3, "mode": "standard"},
        },
    )


def _is_transient(error: Exception) -> bool:
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return False
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return True
    return any(kind.__name__ in _TRANSIENT_CLIENT_ERRORS for kind in type(error).__mro__)


def _name(error: BaseException) -> str:
    return type(error).__name__


@contextmanager
def _explained(verb: str, path: str) -> Iterator[None]:
    """Turn an operating system error into a StorageError with a way out."""
    try:
        yield
    except OSError as error:
        raise _as_storage_error(verb, path, error) from error


_WAYS_OUT = {
    errno.ENOSPC: "the disk is full. Free some space, or choose a folder on another disk; what was there before "
    "is untouched",
    errno.EDQUOT: "your disk quota is used up. Free some space, or choose a folder on another disk",
    errno.ENOENT: "it does not exist. Check the path",
    errno.EACCES: "permission denied. Give this user access (chmod, chown), or choose another folder",
    errno.EPERM: "the system does not permit it. Check the owner and attributes, or choose another folder",
    errno.EROFS: "the file system is read-only. Choose a folder that can be written",
    errno.ENOTDIR: "a part of the path is a file, not a folder. Choose another path",
    errno.EISDIR: "it is a folder, not a file. Choose another path",
    errno.ENAMETOOLONG: "the name is too long for this file system. Choose a shorter one",
    errno.ELOOP: "its links point at each other. Mend the links",
    errno.EMFILE: "too many open files. Raise the limit (ulimit -n)",
    errno.ESTALE: "the network file system lost it. Mount it again",
    errno.EIO: "the disk reported a failure. Check the disk, or choose another one",
}


def _as_storage_error(verb: str, path: str, error: OSError) -> StorageError:
    way_out = _WAYS_OUT.get(error.errno or 0, f"{_name(error)}: {error.strerror or error}")
    return StorageError(f"cannot {verb} {path}: {way_out}")


@contextmanager
def _appearing(path: str) -> Iterator[str]:
    """Give a temporary name beside `path` that becomes `path` when the block ends well, and vanishes else."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{os.path.basename(path)[:200]}.tmp-{secrets.token_hex(6)}")
    try:
        yield temporary
        for name in _files_of(temporary):
            _sync(name)
        os.replace(temporary, path)
    except BaseException:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            _unlink_quietly(temporary)
        raise
    _sync_folder(folder)


def _files_of(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    return [os.path.join(path, name) for name in _walk(path, True, None)]


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: str) -> None:
    try:
        _sync(folder)
    except OSError as error:  # some network file systems cannot sync a folder; the file itself is safe
        log.debug("could not sync %s: %s", folder, error)


def _unlink_quietly(path: str) -> None:
    try:
        os.unlink(path)
    except OSError as error:
        log.debug("could not remove %s: %s", path, error)


def _copy_file(source: str, target: str) -> None:
    with _explained("read", source):
        file = open(source, "rb")
    with file, _explained("write", target), _appearing(target) as temporary, open(temporary, "wb") as copy:
        shutil.copyfileobj(file, copy, 1 << 20)


def _walk(root: str, recursive: bool, on_error: Callable[[str, StorageError], None] | None) -> Iterator[str]:
    """Names of regular files, and of links that lead nowhere (reading tells what is wrong with those)."""
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        rel, above = pending.pop()
        folder = os.path.join(root, rel) if rel else root
        try:
            status = os.stat(folder)
            if not stat.S_ISDIR(status.st_mode) and not rel:
                return
            with os.scandir(folder) as scan:
                entries = list(scan)
        except FileNotFoundError:
            continue
        except OSError as error:
            explained = _as_storage_error("list", folder, error)
            if on_error is None or not rel:
                raise explained from error
            on_error(folder, explained)
            continue
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link to a folder we are inside of
            continue
        for entry in entries:
            name = f"{rel}/{entry.name}" if rel else entry.name
            if entry.is_dir():
                if recursive:
                    pending.append((name, above | {here}))
            elif _TEMPORARY.match(entry.name) is None and (entry.is_file() or entry.is_symlink()):
                yield name
