"""metrics.jsonl: one JSON object per line, the source of every plot."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sepllm_train.base.console import say
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import write_whole
from sepllm_train.base.parsing import parse_json_object

# FLOPs have more digits than 64 bits.
_WIDEST = 10**60


class MetricsLog:
    """Appends records to a file of JSON lines; it is closed after each one, so a killed run loses none.

    A record that cannot be written (the disk is full) does not stop the run: it is kept and written with a later one.
    `mirror`, where it is set, is given every record too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []
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
        with open(self.path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                written = 0
                while written < len(data):
                    written += file.write(data[written:])
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise

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

    def has(self, step: int, key: str) -> bool:
        """True when there is a record of `step` with `key`."""
        lines: list[bytes | str] = list(self.waiting)
        if self.path.exists():
            lines += self.path.read_bytes().split(b"\n")
        records = (record for line in lines if (record := _record(line)) is not None)
        return any(record.get("step") == step and key in record for record in records)


def _step(line: bytes) -> int | None:
    """The step of a line, None when it is no record."""
    record = _record(line)
    step = None if record is None else record.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def _record(line: bytes | str) -> dict[str, Any] | None:
    """The record in a line, None where there is none."""
    try:
        return parse_json_object(line, "", "", nan=True, widest=_WIDEST)
    except UserError:
        return None
