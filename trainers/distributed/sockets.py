"""Finds and closes the sockets that a process group opened, and asks the kernel whether a peer's machine answers.

gloo offers no abort: an operation with a peer whose machine lost power or network waits for its timeout, which is hours
here. If its socket is shut down, the operation raises an error at once.

A process may be silent because one call of a library keeps it busy; the kernel of its machine answers nevertheless. So
TCP's own probes tell a machine without power or network from a busy process, sooner than the silence of the process.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import sys
from multiprocessing.connection import Connection

PROBE_IDLE_SECONDS, PROBE_SECONDS = 2, 1  # of silence before the kernel's first probe, and between two probes
_MOST_PROBES = (
    127  # the kernel's maximum: whether the connection is given up is decided here, not by the kernel
)
_LAST_DATA, _LAST_ACK = (
    11,
    12,
)  # positions of the fields of 4 bytes in Linux's struct tcp_info, after its 8 bytes


def probe_peer(connection: Connection) -> None:
    """Let the kernel probe the peer of a TCP connection whenever nothing is received from it."""
    if sys.platform != "linux":
        return
    with socket.socket(fileno=os.dup(connection.fileno())) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_IDLE_SECONDS)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_SECONDS)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _MOST_PROBES)


def unanswered_seconds(connection: Connection) -> float | None:
    """Return the seconds since anything came from the machine of a probed peer; None if the kernel does not tell."""
    if sys.platform != "linux":
        return None
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as found:
            told = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8 + 4 * (_LAST_ACK + 1))
    except OSError:  # closed meanwhile
        return None
    times = struct.unpack_from(f"={_LAST_ACK + 1}I", told, 8)
    return min(times[_LAST_DATA], times[_LAST_ACK]) / 1000


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
