"""metrics.jsonl: one JSON object per line, the source of every plot."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from sepllm_train.base.console import say
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import write_whole
from sepllm_train.base.parsing import WIDEST_COUNT, parse_json_object


class MetricsLog:
    """Appends records to a file of JSON lines; it is closed after each one, so a killed run loses none.

    A record that cannot be written (the disk is full) does not stop the run: it is kept and written with a later one.
    `mirror`, where it is set, is given every record too. The file is held open for reading meanwhile, so that what it
    had is not lost with its name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []
        self._held: IO[bytes] | None = None
        self._size = 0
        self.mirror: Callable[[dict[str, Any]], None] | None = None

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. Numbers that JSON does not have (nan, inf) become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.waiting.append(json.dumps(clean) + "\n")
        try:
            self._append("".join(self.waiting).encode())
        except OSError as error:
            if len(self.waiting) == 1:
                say(
                    f"warning: {self.path} cannot be written ({error.strerror}): training goes on, and the records are "
                    "written when there is room again."
                )
        else:
            self.waiting.clear()
        if self.mirror is not None:
            self.mirror(clean)

    def _append(self, data: bytes) -> None:
        """Append all of `data` or nothing. Raises OSError."""
        # A file that is gone is not begun anew.
        flags = os.O_WRONLY | os.O_APPEND | (os.O_CREAT if self._held is None else 0)
        with open(self.path, "ab", buffering=0, opener=lambda path, _: os.open(path, flags, 0o666)) as file:
            status = os.fstat(file.fileno())
            if self._held is not None and not os.path.samestat(status, os.fstat(self._held.fileno())):
                raise OSError(errno.ESTALE, "it is another file than before")
            size = status.st_size
            try:
                written = 0
                while written < len(data):
                    written += file.write(data[written:])
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise
        self._size = size + len(data)
        if self._held is None:
            self._hold()

    def _hold(self) -> None:
        """Keep the file open under its name of now."""
        self._held = open(self.path, "rb", buffering=0)  # noqa: SIM115  held for as long as this object
        weakref.finalize(self, self._held.close)
        self._size = os.fstat(self._held.fileno()).st_size

    def fault(self) -> str | None:
        """A change of the file by another process, in words, or None."""
        if self._held is None:
            return None
        try:
            status = os.stat(self.path)
        except OSError:
            return "was removed"
        if not os.path.samestat(status, os.fstat(self._held.fileno())):
            return "was replaced"
        return "was cut" if status.st_size < self._size else None

    def put_back(self) -> Path:
        """Write what the file had into one of its name, or beside it where there is one, and append there from now on.

        Raises OSError or UserError when that fails.
        """
        assert self._held is not None
        self._held.seek(0)
        content = self._held.read()
        if os.path.lexists(self.path):
            self.path = kept_name(self.path)
        write_whole(self.path, content)
        self._held.close()
        self._hold()
        return self.path

    def rewind(self, step: int) -> None:
        """Keep the records up to `step`, which a resumed run will not write again, and drop a torn last line.

        A line before it that is no record (a machine that lost power leaves zeros) is dropped with all after it.
        """
        if not self.path.exists():
            return
        lines = [line + b"\n" for line in self.path.read_bytes().split(b"\n")[:-1]]
        kept = []
        for number, line in enumerate(lines, 1):
            at = _step(line)
            if at is None:
                say(
                    f"warning: line {number} of {self.path} is no record, as after a loss of power: it and the "
                    f"{len(lines) - number} lines after it are dropped, and training goes on."
                )
                break
            if at <= step:
                kept.append(line)
        write_whole(self.path, b"".join(kept))
        self._hold()

    def keep_copy(self) -> Path:
        """Copy the file to a name beside it, which is returned."""
        kept = kept_name(self.path)
        write_whole(kept, self.path.read_bytes())
        return kept

    def last_step(self) -> int:
        """The largest step of its records; -1 without any."""
        if not self.path.exists():
            return -1
        found = (_step(line) for line in self.path.read_bytes().split(b"\n"))
        return max((step for step in found if step is not None), default=-1)

    def has(self, step: int, key: str) -> bool:
        """True when there is a record of `step` with `key`."""
        lines: list[bytes | str] = list(self.waiting)
        if self.path.exists():
            lines += self.path.read_bytes().split(b"\n")
        records = (record for line in lines if (record := _record(line)) is not None)
        return any(record.get("step") == step and key in record for record in records)


def kept_name(path: Path) -> Path:
    """A name beside `path` that no file has: metrics.kept_1.jsonl."""
    for number in itertools.count(1):
        name = path.with_name(f"{path.stem}.kept_{number}{path.suffix}")
        if not os.path.lexists(name):
            return name
    raise AssertionError


def _step(line: bytes) -> int | None:
    """The step of a line, None when it is no record."""
    record = _record(line)
    step = None if record is None else record.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def _record(line: bytes | str) -> dict[str, Any] | None:
    """The record in a line, None where there is none."""
    try:
        return parse_json_object(line, "", "", nan=True, widest=WIDEST_COUNT)
    except UserError:
        return None
