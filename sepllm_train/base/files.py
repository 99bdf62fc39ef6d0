"""Files and folders whose final name means that they are whole (write aside, fsync, rename)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO

from sepllm_train.base.errors import UserError, first_line

PARTIAL = ".partial"
_HASH_CHUNK = 1 << 20


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


class PartialFile:
    """A file that gets its final name in `finish`, and is removed when left before that.

    Its name until then is `<path>.partial`, locked against a second writer; a stale one (its writer was killed, so
    its lock is gone) is simply written over. Raises UserError when it cannot be created or is being written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = Path(f"{path}{PARTIAL}")
        try:
            self._stream: BinaryIO = open(self.partial, "ab", buffering=1 << 20)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"Cannot write {self.partial}: {error.strerror}.") from None
        if not self._lock():
            self._stream.close()
            raise UserError(f"{path} is being written by another process: wait for it or choose another name.")
        self._stream.truncate(0)
        self._hash = hashlib.sha256()
        self._size = 0
        self._finished = False

    def _lock(self) -> bool:
        if not locked(lambda: fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB), self.partial):
            return False
        try:
            # Between opening and locking, the other writer may have given this very file its final name.
            return os.path.samestat(os.fstat(self._stream.fileno()), os.stat(self.partial))
        except FileNotFoundError:
            return False

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        self._stream.write(data)
        self._hash.update(data)
        self._size += len(data)

    def seal(self) -> FileInfo:
        """Put everything written on the disk; returns its size and hash."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return FileInfo(self._size, self._hash.hexdigest())

    def finish(self) -> None:
        """Give the file its final name, replacing what had it; the folder is synced too."""
        os.replace(self.partial, self.path)
        self._finished = True
        self._stream.close()
        sync_folder(self.path.parent)

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            self.partial.unlink(missing_ok=True)
            self._stream.close()


def locked(attempt: Callable[[], None], path: Path) -> bool:
    """True unless `attempt`, which locks `path` without waiting, was refused for another process's lock.

    Where the filesystem has no locks that is reported once on stderr, and the answer is yes.
    """
    try:
        attempt()
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        _warn_of_no_locks(error.strerror)
    return True


def lock_waiting(stream: IO[Any]) -> None:
    """Lock an open file, waiting for another process that holds it.

    Where the filesystem has no locks that is reported once on stderr, and nothing is waited for.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX)
    except OSError as error:
        _warn_of_no_locks(error.strerror)


@functools.cache
def _warn_of_no_locks(reason: str) -> None:
    """Report once for each reason that files cannot be locked."""
    print(
        f"warning: files cannot be locked on this filesystem ({reason}): see to it yourself that no two processes "
        "write the same ones.",
        file=sys.stderr,
        flush=True,
    )


def write_whole(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write a small file at once: aside, fsync, rename. private: for the user alone to read."""
    with PartialFile(path) as target:
        if private:
            # Where the filesystem has no modes, it is as private as the folder.
            with contextlib.suppress(OSError):
                os.chmod(target.partial, 0o600)
        target.write(content)
        target.seal()
        target.finish()


def write_json(path: Path, content: Any, indent: int = 1, *, private: bool = False) -> None:
    """Write a small JSON file whole. private: for the user alone to read."""
    write_whole(path, (json.dumps(content, indent=indent) + "\n").encode(), private=private)


@contextmanager
def whole_folder(output: Path, remedy: str = "") -> Iterator[Path]:
    """Give a folder to write in, which becomes `output` at the end of the block, in place of one that is there.

    Its name until then is `<output>.partial`; it is removed when the block fails. Raises UserError, which ends with
    `remedy`, where it cannot be written.
    """
    aside = output.with_name(output.name + PARTIAL)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for path in aside.rglob("*"):
            sync_folder(path)
        sync_folder(aside)
        _put(aside, output)
        sync_folder(output.parent)
    except OSError as error:
        advice = f": {remedy}" if remedy else ""
        raise UserError(f"cannot write {output} ({error.strerror or first_line(error)}){advice}.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def restore_folder(output: Path) -> None:
    """Put in order what a process left that was killed at the end of `whole_folder`: the old folder gets its name back
    when the new one had not taken it yet, and goes when it had. Raises OSError."""
    old = _removed(output)
    if not old.exists():
        return
    if output.exists() or output.is_symlink():
        _remove(old)
    else:
        os.rename(old, output)


def _put(aside: Path, output: Path) -> None:
    """Rename the folder `aside` to `output`; one that is there goes when the other has its place."""
    if not output.exists():
        os.rename(aside, output)
        return
    old = _removed(output)
    _remove(old)
    os.rename(output, old)
    try:
        os.rename(aside, output)
    except BaseException:
        os.rename(old, output)
        raise
    _remove(old)


def _removed(output: Path) -> Path:
    """Name of the folder that had the name `output`, until the new one has it."""
    return output.with_name(f"{output.name}.removed{PARTIAL}")


def _remove(folder: Path) -> None:
    """Remove a folder, or the link to one; what it points to stays."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a crash of the machine; of a file, its content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> FileInfo:
    """Size and SHA-256 of a file, read in chunks; raises UserError when it cannot be read."""
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as stream:
            while chunk := stream.read(_HASH_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    return FileInfo(size, digest.hexdigest())
