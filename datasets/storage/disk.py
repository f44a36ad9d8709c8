"""Local files: atomic writes, listings that follow links but not loops, and system errors with a remedy."""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dreamfleet.datasets.errors import StorageError

log = logging.getLogger(__name__)

_TEMPORARY = re.compile(
    r"^\..+\.(tmp-[0-9a-f]{12}|lock)$"
)  # temporary files of unfinished writes, and locks, which are never listed


@contextmanager
def explain_errors(verb: str, path: str) -> Iterator[None]:
    """Convert an OSError into a StorageError with a remedy."""
    try:
        yield
    except OSError as error:
        raise as_storage_error(verb, path, error) from error


_REMEDIES = {
    errno.ENOSPC: "the disk is full. Free some space, or choose a folder on another disk "
    "(earlier files are unchanged)",
    errno.EDQUOT: "your disk quota is used up. Free some space, or choose a folder on another disk",
    errno.ENOENT: "it does not exist. Check the path",
    errno.EACCES: "permission denied. Give this user access (chmod, chown), or choose another folder",
    errno.EPERM: "the system does not permit it. Check the owner and attributes, or choose another folder",
    errno.EROFS: "the file system is read-only. Choose a folder that can be written",
    errno.EEXIST: "a file is in the way. Move it, or choose another path",
    errno.ENOTDIR: "a part of the path is a file, not a folder. Choose another path",
    errno.EISDIR: "it is a folder, not a file. Choose another path",
    errno.ENAMETOOLONG: "the name is too long for this file system. Choose a shorter one",
    errno.ELOOP: "its links form a loop. Correct the links",
    errno.EMFILE: "too many open files. Raise the limit (ulimit -n)",
    errno.ESTALE: "the network file system lost it. Mount it again",
    errno.EIO: "the disk reported a failure. Check the disk, or choose another one",
}


def as_storage_error(verb: str, path: str, error: OSError) -> StorageError:
    remedy = _REMEDIES.get(error.errno or 0, f"{type(error).__name__}: {error.strerror or error}")
    return StorageError(f"cannot {verb} {path}: {remedy}")


def inside(name: str) -> str:
    """Return a relative name unchanged. Raises StorageError if it refers to a place outside of its folder.

    Names can come from untrusted manifests, tables and buckets.
    """
    if ".." in name.split("/"):
        raise StorageError(f"{name!r} leaves its folder, and is neither read nor written")
    return name


@contextmanager
def explains_full_disk(path: str) -> Iterator[None]:
    """Raise OSError if the disk is full and a library (torch, safetensors) raises its own error instead."""
    try:
        yield
    except Exception as error:
        full = _as_full_disk(error, path)
        if full is None:
            raise
        raise full from error


def _as_full_disk(error: Exception, path: str) -> OSError | None:
    text = str(error)
    reported = "No space left" in text or "os error 28" in text
    torch_failed = "PytorchStreamWriter" in text or "inline_container" in text or "iostream error" in text
    if reported or (torch_failed and shutil.disk_usage(os.path.dirname(path)).free < 1 << 24):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    return None


@contextmanager
def atomic_write(path: str, *, durable: bool = True) -> Iterator[str]:
    """Yield a temporary path beside `path`, which is renamed to `path` at the end, or removed if the block raises.

    With `durable` the data are synced to the disk; copies of other files do not need it. File modes follow the umask
    (or the folder's default ACL), even if a library restricts them, so that other users can read the files.
    """
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    name = os.fsdecode(os.fsencode(os.path.basename(path))[:200])  # file systems limit bytes, not characters
    temporary = os.path.join(folder, f".{name}.tmp-{secrets.token_hex(6)}")
    try:
        yield temporary
        written = _files_of(temporary)
        _follow_umask(written)
        for name in written if durable else ():
            _sync(name)
        os.replace(temporary, path)
    except BaseException:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            _unlink_quietly(temporary)
        raise
    if durable:
        _sync_folder(folder)


def _files_of(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    return [os.path.join(path, name) for name in walk(path, True, None)]


def _follow_umask(files: list[str]) -> None:
    """Set the mode of files that a library such as safetensors restricted to their owner to what the umask allows."""
    restricted = [name for name in files if not stat.S_IMODE(os.stat(name).st_mode) & 0o077]
    if not restricted:
        return
    # A process cannot read its umask without changing it for all its threads.
    probe = f"{restricted[0]}-mode"
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = stat.S_IMODE(os.stat(probe).st_mode)
    os.unlink(probe)
    for name in restricted:
        os.chmod(name, mode)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: str) -> None:
    try:
        _sync(folder)
    except OSError as error:  # some network file systems cannot sync a folder; the file itself was synced
        log.debug("could not sync %s: %s", folder, error)


def _unlink_quietly(path: str) -> None:
    try:
        os.unlink(path)
    except OSError as error:
        log.debug("could not remove %s: %s", path, error)


def copy_file(source: str, target: str) -> None:
    """Copy one file atomically."""
    with explain_errors("read", source):
        file = open(source, "rb")  # noqa: SIM115  closed below; opened here so that errors name the source
    with (
        file,
        explain_errors("write", target),
        atomic_write(target) as temporary,
        open(temporary, "wb") as copy,
    ):
        shutil.copyfileobj(file, copy, 1 << 20)


def tree_size(path: str) -> int:
    """Return the size in bytes of a file, or of all files in a folder and its subfolders."""
    if not os.path.isdir(path):
        return os.path.getsize(path)
    return sum(os.path.getsize(os.path.join(path, name)) for name in walk(path, True, None))


def remove_tree(path: str) -> None:
    """Remove a file, a link or a folder with its content, if it exists."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def walk(root: str, recursive: bool, on_error: Callable[[str, StorageError], None] | None) -> Iterator[str]:
    """Yield the names of regular files below a folder, and of dangling links, which raise a clear error when read."""
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
            failure = as_storage_error("list", folder, error)
            if on_error is None or not rel:
                raise failure from error
            on_error(folder, failure)
            continue
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link to a parent folder
            continue
        for entry in entries:
            name = f"{rel}/{entry.name}" if rel else entry.name
            kind = _kind(entry)
            if kind == "folder":
                if recursive:
                    pending.append((name, above | {here}))
            elif kind == "file" and _TEMPORARY.match(entry.name) is None:
                yield name


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "folder"
        return (
            "file" if entry.is_file() or entry.is_symlink() else "other"
        )  # reading a pipe could block forever
    except OSError:  # a link to itself, or a folder without permission: reading it raises a clear error
        return "file"
