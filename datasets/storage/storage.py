"""A single interface to list, read and write files on a local disk or in a bucket (s3://, gs://)."""

from __future__ import annotations

import builtins
import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from dreamfleet.datasets.decode_text import decode_text
from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.storage.bucket_keys import (
    bucket_files,
    bucket_folders,
    bucket_has,
    bucket_size,
    first_file,
    is_folder,
)
from dreamfleet.datasets.storage.conditional import CONDITIONS
from dreamfleet.datasets.storage.disk import (
    as_storage_error,
    atomic_write,
    copy_file,
    explain_errors,
    explains_full_disk,
    inside,
    remove_tree,
    tree_size,
    walk,
)
from dreamfleet.datasets.storage.object_store import Bucket, bucket_at, parse_address

T = TypeVar("T")
Check = Callable[[bool], None]


class Storage:
    """A folder on disk or a prefix in a bucket; the arguments `rel` of its methods are paths relative to it.

    Local paths are made absolute immediately, since Ray workers change the working directory. Buckets are
    `s3://bucket/prefix` and `gs://bucket/prefix`. The S3 endpoint is read from `AWS_ENDPOINT_URL_S3` or
    `AWS_ENDPOINT_URL`, keys from the environment or the machine's role, never from the URL. An unpickled instance opens
    its own connection, with the keys of its machine. A file must have only one writer at a time.

    All methods raise StorageError with a remedy, also if a file does not exist.
    """

    def __init__(self, url: str | os.PathLike[str] | Storage) -> None:
        text = url.url if isinstance(url, Storage) else os.fspath(url)
        self.url: str
        self.scheme, self.url = parse_address(text)
        self._connection: Bucket | None = None
        self._appended: dict[str, str] = {}
        self._check: Check = _allow

    @property
    def is_local(self) -> bool:
        """Whether this is a folder in this machine's file system."""
        return not self.scheme

    def path(self, *parts: str) -> str:
        """Return the address of `parts` in this folder. Raises StorageError for a place outside of it."""
        clean = [inside(part).strip("/") for part in parts if part.strip("/")]
        return os.path.join(self.url, *clean) if self.is_local else "/".join([self.url, *clean])

    def child(self, *parts: str) -> Storage:
        """Return the storage of a subfolder, with the same guard."""
        child = Storage(self.path(*parts))
        child._connection, child._check = self._connection, self._check
        return child

    def guarded(self, check: Check) -> Storage:
        """Return this folder with a guard, which may raise to refuse a write or a removal.

        ``check(fresh)`` is called before each of them, also before each repetition of a failed request; ``fresh`` is
        False for text appended to a log, for which the result of a recent check is enough. Not pickled.
        """
        guarded = self.child()
        guarded._check = check
        return guarded

    def exists(self, rel: str = "") -> bool:
        """Return whether a file or folder exists; in a bucket a folder exists if it contains a file."""
        if self.is_local:
            with explain_errors("check", path := self.path(rel)):
                return os.path.exists(path)
        return self._on_bucket("check", rel, bucket_has)

    def has_files(self, rel: str = "") -> bool:
        """Return whether a folder contains a file at any depth."""
        if self.is_local:
            return next(walk(self.path(rel), True, None), None) is not None
        return bool(self._if_exists("list", rel, first_file))

    def size(self, rel: str = "") -> int:
        """Return the size in bytes of a file, or of all files below a folder."""
        if self.is_local:
            with explain_errors("read", path := self.path(rel)):
                return tree_size(path)
        return self._on_bucket("read", rel, bucket_size)

    def list(
        self,
        rel: str = "",
        recursive: bool = False,
        *,
        on_error: Callable[[str, StorageError], None] | None = None,
    ) -> builtins.list[str]:
        """Return the sorted names of the files in a folder, relative to it, with `/`; [] if it does not exist.

        Links to folders are followed, except in loops. `on_error(folder, error)` is called for subfolders that cannot
        be listed; without it they raise StorageError.
        """
        if self.is_local:
            return sorted(walk(self.path(rel), recursive, on_error))
        return self._if_exists("list", rel, lambda fs, key: bucket_files(fs, key, recursive))

    def list_dirs(self, rel: str = "") -> builtins.list[str]:
        """Return the sorted names of the direct subfolders; [] if the folder does not exist.

        In a bucket these are only the ones that contain a file, since empty folders are mere marker objects.
        """
        if self.is_local:
            with explain_errors("list", path := self.path(rel)):
                if not os.path.isdir(path):
                    return []
                with os.scandir(path) as entries:
                    return sorted(entry.name for entry in entries if entry.is_dir())
        return self._if_exists("list", rel, bucket_folders)

    # ---- read ----------------------------------------------------------------------------------------

    def read_bytes(self, rel: str = "", *, start: int = 0, end: int | None = None) -> bytes:
        """Return the content of a file, or its bytes from ``start`` to ``end``; fewer if the file ends before."""
        if end is not None and end <= start:
            return b""
        if self.is_local:
            path = self.path(rel)
            with explain_errors("read", path), open(path, "rb") as file:
                file.seek(start)
                return file.read(-1 if end is None else end - start)
        return self._on_bucket(
            "read", rel, lambda fs, key: bytes(fs.cat_file(key, start=start or None, end=end))
        )

    def read_text(self, rel: str = "") -> str:
        """Return the text of a UTF-8 file, without a byte order mark."""
        try:
            return decode_text(self.read_bytes(rel), uri=self.path(rel))
        except DataError as error:
            raise StorageError(str(error)) from error

    @contextmanager
    def local_copy(self, rel: str = "") -> Iterator[Path]:
        """Yield a local path of a file or folder: its own on disk, or that of a copy that is removed afterwards."""
        if self.is_local:
            path = self.path(rel)
            if not os.path.exists(path):
                raise as_storage_error("read", path, FileNotFoundError(errno.ENOENT, "No such file"))
            yield Path(path)
            return
        with tempfile.TemporaryDirectory(prefix="dreamfleet-") as folder:
            target = Path(folder) / (self.path(rel).rsplit("/", 1)[1])
            self.download(rel, target)
            yield target

    def download(self, rel: str, local_path: str | os.PathLike[str]) -> None:
        """Copy a file or a folder to a local path; each file is written atomically."""
        target = os.path.abspath(os.fspath(local_path))
        path = self.path(rel)
        if not (os.path.isdir(path) if self.is_local else self._on_bucket("read", rel, is_folder)):
            self._copy_to(target, rel)
            return
        os.makedirs(target, exist_ok=True)
        folder = self.child(rel)
        for name in folder.list("", recursive=True):
            folder._copy_to(os.path.join(target, *inside(name).split("/")), name)

    # ---- write ---------------------------------------------------------------------------------------

    def write_bytes(self, rel: str, data: bytes) -> None:
        """Write a file atomically: if writing fails, an existing file is unchanged."""
        if self.is_local:
            path = self.path(rel)
            with explain_errors("write", path), atomic_write(path) as temporary:
                with open(temporary, "wb") as file:
                    file.write(data)
                self._check(True)
            return
        self._change("write", rel, lambda fs, key: fs.pipe_file(key, data))

    def write_text(self, rel: str, text: str) -> None:
        """Write a UTF-8 file, atomically as write_bytes does."""
        self.write_bytes(rel, text.encode("utf-8"))
        self._appended.pop(rel, None)

    def append_text(self, rel: str, text: str) -> None:
        """Append text to a file.

        Since buckets cannot append, the whole object is written again from a buffer in memory. Use this only for logs
        of a few megabytes with one writer.
        """
        if self.is_local:
            path = self.path(rel)
            self._check(False)
            with explain_errors("write", path):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "a", encoding="utf-8", newline="") as file:
                    file.write(text)
            return
        if rel not in self._appended:
            self._appended[rel] = self.read_text(rel) if self.exists(rel) else ""
        whole = self._appended[rel] + text
        self._change("write", rel, lambda fs, key: fs.pipe_file(key, whole.encode("utf-8")), fresh=False)
        self._appended[rel] = whole

    @contextmanager
    def staging(self, rel: str) -> Iterator[Path]:
        """Yield a local path for writing a large file, which is moved into the storage when the block ends.

        If the block raises, the temporary file is removed and an existing file is unchanged.
        """
        if self.is_local:
            path = self.path(rel)
            with explain_errors("write", path), atomic_write(path) as temporary, explains_full_disk(path):
                yield Path(temporary)
                self._check(True)
            return
        with tempfile.TemporaryDirectory(prefix="dreamfleet-") as folder:
            temporary_file = Path(folder) / rel.rsplit("/", 1)[-1]
            with explain_errors("write", str(temporary_file)), explains_full_disk(str(temporary_file)):
                yield temporary_file
            self.upload(temporary_file, rel)

    def upload(self, local_path: str | os.PathLike[str], rel: str = "") -> None:
        """Copy a local file or folder into the storage; each file is written atomically."""
        source = os.path.abspath(os.fspath(local_path))
        if os.path.isdir(source):
            for name in Storage(source).list("", recursive=True):
                self.upload(os.path.join(source, name), "/".join(part for part in (rel, name) if part))
        elif self.is_local:
            self._check(True)
            copy_file(source, self.path(rel))
        elif not os.path.exists(source):
            raise as_storage_error("read", source, FileNotFoundError(errno.ENOENT, "No such file"))
        else:
            self._change("write", rel, lambda fs, key: fs.put_file(source, key))

    def remove(self, rel: str) -> None:
        """Remove a file or a folder with its content, if it exists."""
        self._appended.pop(rel, None)
        self._check(True)
        if self.is_local:
            with explain_errors("remove", path := self.path(rel)):
                remove_tree(path)
            return
        self._if_exists("remove", rel, lambda fs, key: fs.rm(key, recursive=True) or [])

    # ---- conditional writes --------------------------------------------------------------------------

    def read_version(self, rel: str) -> tuple[bytes, str]:
        """Return the content of a file and its version for :meth:`write_if`; (b"", "") if it does not exist."""
        read = CONDITIONS[self.scheme].read
        if self.is_local:
            with explain_errors("read", path := self.path(rel)):
                return read(None, path)
        return self._on_bucket("read", rel, read)

    def write_if(self, rel: str, data: bytes, *, version: str) -> bool:
        """Write a file if it still has ``version`` ("": does not exist); return whether it was written.

        ``data`` must differ from what any other writer would write: a request whose answer was lost and that is sent
        again then recognises its own data, and counts as written. See :mod:`conditional` for servers without this.
        """
        write = CONDITIONS[self.scheme].write
        if self.is_local:
            self._check(True)
            with explain_errors("write", path := self.path(rel)):
                return write(None, path, data, version)
        return self._change("write", rel, lambda fs, key: write(fs, key, data, version))

    def remove_if(self, rel: str, *, version: str) -> None:
        """Remove a file if it still has ``version``."""
        remove = CONDITIONS[self.scheme].remove
        if self.is_local:
            self._check(True)
            with explain_errors("remove", path := self.path(rel)):
                return remove(None, path, version)
        return self._change("remove", rel, lambda fs, key: remove(fs, key, version))

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.url,)

    def _copy_to(self, target: str, rel: str) -> None:
        if self.is_local:
            copy_file(self.path(rel), target)
            return
        with explain_errors("write", target), atomic_write(target, durable=False) as temporary:
            self._on_bucket("read", rel, lambda fs, key: fs.get_file(key, temporary))

    def _on_bucket(
        self, verb: str, rel: str, action: Callable[[Any, str], T], *, is_guarded: bool = False
    ) -> T:
        """Run `action(file system, key)` with the bucket's retries and error messages."""
        if self._connection is None:
            self._connection = bucket_at(self.url)
        return self._connection.run(verb, self.path(rel), action, is_guarded=is_guarded)

    def _change(self, verb: str, rel: str, action: Callable[[Any, str], T], *, fresh: bool = True) -> T:
        """Run `action` as :meth:`_on_bucket`, with the guard's check before each attempt."""

        def act(fs: Any, key: str) -> T:
            self._check(fresh)
            return action(fs, key)

        return self._on_bucket(verb, rel, act, is_guarded=self._check is not _allow)

    def _if_exists(
        self, verb: str, rel: str, action: Callable[[Any, str], builtins.list[str]]
    ) -> builtins.list[str]:
        """Run `action`; return [] if nothing is found. Raises StorageError if the bucket itself does not exist."""

        def act(fs: Any, key: str) -> builtins.list[str]:
            try:
                return action(fs, key)
            except FileNotFoundError as error:
                assert self._connection is not None
                if not self._connection.exists():
                    raise FileNotFoundError(errno.ENOENT, "No such bucket") from error
                return []

        return self._on_bucket(verb, rel, act)


def _allow(fresh: bool) -> None:
    """Allow a write to a folder without a guard."""


def read_uri(uri: str, *, start: int = 0, end: int | None = None) -> bytes:
    """Return the content of the file at an absolute local path or bucket address, or a range of its bytes.

    Raises StorageError.
    """
    folder, _, name = uri.rpartition("/")
    return Storage(folder or "/").read_bytes(name, start=start, end=end)


def read_text(uri: str) -> str:
    """Return the text of the file at a local path or bucket address. Raises StorageError, DataError if not UTF-8."""
    return decode_text(read_uri(uri), uri=uri)
