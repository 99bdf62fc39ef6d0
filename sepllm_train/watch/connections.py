"""Limits on connections: how many there are, and how large and how slow the head of a request may be."""

from __future__ import annotations

import contextlib
import io
import resource
import socket
import threading
import time
from typing import Any

# Connections at once; a browser opens six. Each has a thread and a descriptor, of which others have some too.
MOST = min(64, max(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))


class Connections:
    """The open connections. For one too many another is closed: the oldest that has asked for nothing yet, else the one
    whose last request is the longest ago. Whoever holds many open keeps nobody out."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._lock = threading.Lock()
        # In the order of their coming, and of their last requests.
        self._silent: dict[socket.socket, None] = {}
        self._asked: dict[socket.socket, None] = {}

    def add(self, connection: socket.socket) -> None:
        """Count a new connection."""
        with self._lock:
            while len(self._silent) + len(self._asked) >= self.most:
                self._close_one()
            self._silent[connection] = None

    def asked(self, connection: socket.socket) -> None:
        """Note a whole request of a connection."""
        with self._lock:
            if self._forget(connection):
                self._asked[connection] = None

    def discard(self, connection: socket.socket) -> None:
        """Forget a connection that is closed."""
        with self._lock:
            self._forget(connection)

    def close_one(self) -> None:
        """Close a connection, if there is one."""
        with self._lock:
            if self._silent or self._asked:
                self._close_one()

    def _forget(self, connection: socket.socket) -> bool:
        """Forget a connection; whether it was known."""
        known = connection in self._silent or connection in self._asked
        self._silent.pop(connection, None)
        self._asked.pop(connection, None)
        return known

    def _close_one(self) -> None:
        oldest = next(iter(self._silent or self._asked))
        self._forget(oldest)
        # Its thread then reads the end of the stream, and closes it.
        with contextlib.suppress(OSError):
            oldest.shutdown(socket.SHUT_RDWR)


class HeadTooLarge(Exception):
    """The head of a request is larger than allowed."""


class HeadReader(io.RawIOBase):
    """Bytes of a connection, for the heads of requests alone.

    idle: seconds to wait for a request. seconds: for the rest of its head, however it comes. most: bytes of a head.
    Reading raises TimeoutError and HeadTooLarge.
    """

    def __init__(self, connection: socket.socket, idle: float, seconds: float, most: int) -> None:
        self._connection = connection
        self._idle, self._seconds, self._most = idle, seconds, most
        self.expect()

    def expect(self) -> None:
        """Begin with another request."""
        self._left = self._most
        self._end: float | None = None

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a part of `buffer`; gives its length, 0 at the end."""
        if self._left <= 0:
            raise HeadTooLarge
        wait = self._idle if self._end is None else self._end - time.monotonic()
        if wait <= 0:
            raise TimeoutError("the head of the request is not whole in time")
        self._connection.settimeout(wait)
        try:
            count = self._connection.recv_into(memoryview(buffer)[: self._left])
        finally:
            self._connection.settimeout(self._idle)
        if self._end is None:
            self._end = time.monotonic() + self._seconds
        self._left -= count
        return count
