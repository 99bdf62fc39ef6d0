"""Reading a file of lines while another process appends to it or replaces it."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

# Bytes read at once. A line without an end in as many is no record.
SLICE = 1 << 20
# Bytes before the offset that are compared to notice another file of the same number and no smaller size.
_REMEMBERED = 64


@dataclass(frozen=True)
class Piece:
    """Whole new lines: (number, line without its end), the first line of the file being 1.

    `restarted`: the file is another one than before, these are its first lines. `overlong` is the number of a line
    that was passed over because it does not end within SLICE bytes.
    """

    lines: list[tuple[int, bytes]]
    restarted: bool = False
    overlong: int | None = None


def open_within(folder: Path, name: str) -> int:
    """Descriptor of the plain file `name` of a folder, for reading.

    Raises OSError, also for a symbolic link (it may lead out of the folder) and for what is no plain file.
    """
    descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is no plain file")
    return descriptor


class Tail:
    """Gives the lines of a file that are new since the last call; a last line without its end waits for it.

    A file that shrinks, is replaced by another or has other bytes before the place reached is read anew.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.offset = 0
        self.size = 0
        # Time of the last write, seconds since 1970; None until the file has been seen.
        self.written: float | None = None
        self._lines = 0
        self._identity: tuple[int, int] | None = None
        self._before = b""
        self._in_overlong = False
        self._torn = 0

    @property
    def pending(self) -> int:
        """Bytes seen but not yet read, without a last line that is still being written."""
        return max(0, self.size - self.offset - self._torn)

    def look(self) -> None:
        """Learn the size without reading."""
        self.size = os.stat(self.folder / self.name, follow_symlinks=False).st_size

    def read(self) -> Piece:
        """The next lines, at most SLICE bytes of them. Raises OSError."""
        # Opened each time: a network filesystem then shows what other nodes have written.
        descriptor = open_within(self.folder, self.name)
        try:
            restarted = self._is_another(descriptor)
            if restarted:
                self.offset, self._lines, self._before, self._in_overlong = 0, 0, b"", False
            data = os.pread(descriptor, SLICE, self.offset)
        finally:
            os.close(descriptor)
        return self._split(data, restarted)

    def _is_another(self, descriptor: int) -> bool:
        """True if this is not the file that was read before, or no longer begins with what was read."""
        status = os.fstat(descriptor)
        identity = (status.st_dev, status.st_ino)
        known, self._identity = self._identity, identity
        self.size, self.written = status.st_size, status.st_mtime
        if known is None:
            return False
        before = os.pread(descriptor, len(self._before), self.offset - len(self._before))
        return known != identity or status.st_size < self.offset or before != self._before

    def _split(self, data: bytes, restarted: bool) -> Piece:
        """Whole lines of `data`, and the offset behind them."""
        end = data.rfind(b"\n") + 1
        self._torn = len(data) - end if len(data) < SLICE else 0
        overlong = None
        if end == 0:
            if len(data) < SLICE:
                return Piece([], restarted)
            if not self._in_overlong:
                overlong = self._lines + 1
            self._in_overlong, end = True, SLICE
            self._advance(data)
            return Piece([], restarted, overlong)
        self._advance(data[:end])
        lines = data[: end - 1].split(b"\n")
        first = self._lines + 1
        self._lines += len(lines)
        numbered = list(enumerate(lines, first))
        if self._in_overlong:
            self._in_overlong = False
            del numbered[0]
        return Piece(numbered, restarted)

    def _advance(self, data: bytes) -> None:
        """Count `data` as read."""
        self.offset += len(data)
        self._before = (self._before + data[-_REMEMBERED:])[-_REMEMBERED:]
