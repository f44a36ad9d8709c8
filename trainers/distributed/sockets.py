"""Finds and closes the sockets that a process group opened, which ends collective operations with a silent peer.

gloo offers no abort: an operation with a peer whose machine lost power or network waits for its timeout, which is hours
here. If its socket is shut down, the operation raises an error at once.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat


class OpenedSockets:
    """The connected TCP sockets that this process opened since the object was created, until :meth:`seal`."""

    def __init__(self) -> None:
        self._before = _sockets()
        self._sealed: dict[int, int] | None = None

    def seal(self) -> None:
        """Stop counting: sockets opened later belong to others."""
        self._sealed = self._opened()

    @property
    def is_sealed(self) -> bool:
        """Whether the counting has ended."""
        return self._sealed is not None

    def shut(self) -> int:
        """Shut the sockets down, so that operations on them fail; return how many."""
        opened = self._opened() if self._sealed is None else self._sealed
        return sum(_shut(number, inode) for number, inode in opened.items())

    def _opened(self) -> dict[int, int]:
        return {number: inode for number, inode in _sockets().items() if self._before.get(number) != inode}


def _sockets() -> dict[int, int]:
    """Return the inode of each socket among this process's files, by file number."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the file of the listing itself is closed by now
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found[int(name)] = status.st_ino
    return found


def _shut(number: int, inode: int) -> bool:
    """Shut down one connected TCP socket, unless its file number belongs to another file by now."""
    try:
        with socket.socket(fileno=os.dup(number)) as found:
            if os.fstat(found.fileno()).st_ino != inode or found.family not in (
                socket.AF_INET,
                socket.AF_INET6,
            ):
                return False
            found.getpeername()
            found.shutdown(socket.SHUT_RDWR)
    except OSError:  # closed meanwhile, or a listening socket
        return False
    return True
