"""List, read and write files on a local disk or in a bucket (s3://, gs://) through one face."""

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
from dreamfleet.datasets.storage.disk import (
    appearing,
    as_storage_error,
    copy_file,
    explained,
    full_disk_told,
    inside,
    remove_tree,
    tree_size,
    walk,
)
from dreamfleet.datasets.storage.object_store import (
    Bucket,
    bucket_files,
    bucket_folders,
    bucket_has,
    bucket_size,
    first_file,
    parse_address,
)

T = TypeVar("T")


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
        self.url: str
        self.scheme, self.url = parse_address(text)
        self._connection: Bucket | None = None
        self._appended: dict[str, str] = {}

    @property
    def is_local(self) -> bool:
        """True for a folder on this machine's file system."""
        return not self.scheme

    def path(self, *parts: str) -> str:
        """Join `parts` to the address of this storage; StorageError for a name that leads out of it."""
        clean = [inside(part).strip("/") for part in parts if part.strip("/")]
        if self.is_local:
            return os.path.join(self.url, *clean)
        return "/".join([self.url, *clean])

    def child(self, *parts: str) -> Storage:
        """The storage of a folder inside this one."""
        child = Storage(self.path(*parts))
        child._connection = self._connection
        return child

    def exists(self, rel: str = "") -> bool:
        """Say whether a file or a folder is there (in a bucket a folder is there when a file is in it)."""
        path = self.path(rel)
        if self.is_local:
            with explained("look at", path):
                return os.path.exists(path)
        return self._on_bucket("look at", rel, bucket_has)

    def has_files(self, rel: str = "") -> bool:
        """Say whether a file lies in a folder, at any depth: empty folders are nothing."""
        if self.is_local:
            return next(walk(self.path(rel), True, None), None) is not None
        return bool(self._if_there("list", rel, first_file))

    def size(self, rel: str = "") -> int:
        """Bytes of a file, or of all files under a folder."""
        if self.is_local:
            path = self.path(rel)
            with explained("read", path):
                return tree_size(path)
        return self._on_bucket("read", rel, bucket_size)

    def list(
        self,
        rel: str = "",
        recursive: bool = False,
        *,
        on_error: Callable[[str, StorageError], None] | None = None,
    ) -> builtins.list[str]:
        """Names of the files in a folder, relative to it, sorted, `/` between parts; [] when it is absent.

        Links to folders are followed, loops of them are not. `on_error(folder, error)` gets subfolders that
        cannot be listed; without it they raise StorageError.
        """
        if self.is_local:
            return sorted(walk(self.path(rel), recursive, on_error))
        return self._if_there("list", rel, lambda fs, key: bucket_files(fs, key, recursive))

    def list_dirs(self, rel: str = "") -> builtins.list[str]:
        """Names of the folders directly inside a folder, sorted; [] when it is absent.

        A bucket has no folders, only markers of them: there, those with a file in them.
        """
        if self.is_local:
            path = self.path(rel)
            with explained("list", path):
                if not os.path.isdir(path):
                    return []
                with os.scandir(path) as entries:
                    return sorted(entry.name for entry in entries if entry.is_dir())
        return self._if_there("list", rel, bucket_folders)

    # ---- read ----------------------------------------------------------------------------------------

    def read_bytes(self, rel: str = "") -> bytes:
        """Read a whole file."""
        if self.is_local:
            path = self.path(rel)
            with explained("read", path), open(path, "rb") as file:
                return file.read()
        return self._on_bucket("read", rel, lambda fs, key: bytes(fs.cat_file(key)))

    def read_text(self, rel: str = "") -> str:
        """Read a whole UTF-8 file (a byte order mark is dropped)."""
        try:
            return decode_text(self.read_bytes(rel), uri=self.path(rel))
        except DataError as error:
            raise StorageError(str(error)) from error

    @contextmanager
    def local_copy(self, rel: str = "") -> Iterator[Path]:
        """Give a local path of a file or folder: itself on disk, else a copy that vanishes afterwards."""
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
        """Copy a file or a folder to a local path; each file appears whole or not at all."""
        target = os.path.abspath(os.fspath(local_path))
        if self.is_local:
            source = self.path(rel)
            if os.path.isdir(source):
                for name in self.child(rel).list("", recursive=True):
                    copy_file(os.path.join(source, name), os.path.join(target, name))
            else:
                copy_file(source, target)
            return

        def fetch(fs: Any, key: str) -> None:
            if fs.info(key)["type"] != "directory":
                with appearing(target, durable=False) as temporary:
                    fs.get_file(key, temporary)
                return
            os.makedirs(target, exist_ok=True)
            for name in self.child(rel).list("", recursive=True):
                local = os.path.join(target, *inside(name).split("/"))
                with appearing(local, durable=False) as temporary:
                    fs.get_file(f"{key}/{name}", temporary)

        self._on_bucket("read", rel, fetch)

    # ---- write ---------------------------------------------------------------------------------------

    def write_bytes(self, rel: str, data: bytes) -> None:
        """Write a whole file: afterwards it is there completely, or as it was before."""
        if self.is_local:
            path = self.path(rel)
            with explained("write", path), appearing(path) as temporary, open(temporary, "wb") as file:
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
            with explained("write", path):
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
            with explained("write", path), appearing(path) as temporary, full_disk_told(path):
                yield Path(temporary)
            return
        with tempfile.TemporaryDirectory(prefix="dreamfleet-") as folder:
            temporary_file = Path(folder) / rel.rsplit("/", 1)[-1]
            with explained("write", str(temporary_file)), full_disk_told(str(temporary_file)):
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
            copy_file(source, self.path(rel))
            return
        if not os.path.exists(source):
            raise as_storage_error("read", source, FileNotFoundError(errno.ENOENT, "No such file"))
        self._on_bucket("write", rel, lambda fs, key: fs.put_file(source, key))

    def remove(self, rel: str) -> None:
        """Remove a file or a whole folder; what is not there needs no removing."""
        self._appended.pop(rel, None)
        if self.is_local:
            path = self.path(rel)
            with explained("remove", path):
                remove_tree(path)
            return
        self._if_there("remove", rel, lambda fs, key: fs.rm(key, recursive=True) or [])

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.url,)

    def _on_bucket(self, verb: str, rel: str, action: Callable[[Any, str], T]) -> T:
        """Run `action(file system, key)` with the bucket's retries and explanations."""
        if self._connection is None:
            self._connection = Bucket(self.scheme, self.url.partition("://")[2].split("/", 1)[0])
        return self._connection.run(verb, self.path(rel), action)

    def _if_there(
        self, verb: str, rel: str, action: Callable[[Any, str], builtins.list[str]]
    ) -> builtins.list[str]:
        """Run `action`; [] where there is nothing, and the error where the whole bucket is not there."""

        def act(fs: Any, key: str) -> builtins.list[str]:
            try:
                return action(fs, key)
            except FileNotFoundError as error:
                assert self._connection is not None
                if not self._connection.is_there():
                    raise FileNotFoundError(errno.ENOENT, "No such bucket") from error
                return []

        return self._on_bucket(verb, rel, act)


def read_uri(uri: str) -> bytes:
    """Read the file at an absolute local path or bucket address; StorageError as Storage gives it."""
    folder, _, name = uri.rpartition("/")
    return Storage(folder or "/").read_bytes(name)


def read_text(uri: str) -> str:
    """Read the UTF-8 file at a local path or bucket address. Raises StorageError, or DataError for other text."""
    return decode_text(read_uri(uri), uri=uri)
