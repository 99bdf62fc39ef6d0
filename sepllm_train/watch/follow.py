"""A run that is followed while it trains: its rows, its status and what is wrong with its files."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sepllm_train.base.errors import UserError
from sepllm_train.base.parsing import WIDEST_COUNT, parse_json, parse_json_object
from sepllm_train.runs.padding import without_padding
from sepllm_train.runs.records import CUMULATIVE, LARGEST, LOSS, Record, name_of, score_of
from sepllm_train.watch.tail import SLICE, Tail, open_within
from sepllm_train.watch.thin import SCALES, Rows, Thinned

COUNTERS = ("step", *CUMULATIVE)
TRAINING = ("train/loss", "train/tokens_per_second", "train/attended_share")
# The curves of a run: name, key of its values, and the columns that go with them.
CURVES = {
    "loss": ("train/loss", COUNTERS),
    "validation": (LOSS, COUNTERS),
    "throughput": ("train/tokens_per_second", ("step", "tokens")),
    "share": ("train/attended_share", ("step", "tokens")),
}
# The columns of the curves of scores, which are named by their keys: eval/TASK/METRIC.
SCORED = COUNTERS
# Most curves of scores of a run; others are left out.
_SCORES = 64
# Records from which the pace of a run is taken.
_RECENT = 100
_NOTES = 5


class FollowedRun:
    """The run in `folder` as far as it is known. `version` grows with every change of its rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info: Record = {}
        # Takes the padding out of the counts of older runs, once run.json says what the model is.
        self._corrected: Callable[[Record], Record] = dict
        self.version = 0
        self._tail = Tail(folder, "metrics.jsonl")
        self._described: tuple[int, ...] | None = None
        self._folder_notes: list[str] = []
        self._forget()

    def _forget(self) -> None:
        """Begin with no record."""
        self.step = -1
        self.mfu: float | None = None
        self._training = Rows(len(COUNTERS) + len(TRAINING))
        self._validation = Rows(len(COUNTERS) + 1)
        self._scores: dict[str, Rows] = {}
        self._line_notes: list[str] = []
        self._broken = 0
        # Rows of either table that are as the thinned curves last saw them.
        self._unchanged = {"training": 0, "validation": 0}
        self._thinned = {(curve, scale): Thinned(scale) for curve in CURVES for scale in SCALES}

    @property
    def name(self) -> str:
        """Name of the run, or of its folder until run.json names it."""
        return name_of(self.info, self.folder)

    @property
    def pending(self) -> int:
        """Bytes of metrics.jsonl seen but not yet read."""
        return self._tail.pending

    @property
    def size(self) -> int:
        """Bytes of metrics.jsonl."""
        return self._tail.size

    @property
    def notes(self) -> list[str]:
        """Sentences on what is wrong with the files of the run."""
        more = self._broken - len(self._line_notes)
        rest = [f"{more:,} more lines of metrics.jsonl are skipped."] if more > 0 else []
        return [*self._folder_notes, *self._line_notes, *rest]

    def look(self) -> None:
        """Learn how much there is to read."""
        try:
            self._tail.look()
        except OSError:
            self._tail.size = 0

    def read(self) -> bool:
        """Take in run.json and at most SLICE bytes of metrics.jsonl; whether anything is new."""
        before = self._folder_notes
        self._folder_notes = []
        changed = self._read_info()
        try:
            piece = self._tail.read()
        except FileNotFoundError:
            if self.version and self._tail.written is not None:
                self._folder_notes.append("metrics.jsonl is gone: these are its last records.")
        except OSError as error:
            self._folder_notes.append(f"metrics.jsonl cannot be read: {_reason(error)}.")
        else:
            if piece.restarted:
                self._forget()
            if piece.overlong is not None:
                self._broken_line(piece.overlong, f"is longer than {SLICE >> 20} MiB")
            for number, line in piece.lines:
                self._take(number, line)
            if piece.lines or piece.restarted or piece.overlong is not None:
                self.version += 1
                changed = True
        return changed or before != self._folder_notes

    def _read_info(self) -> bool:
        """Read run.json if it is another than before; whether it is."""
        try:
            descriptor = open_within(self.folder, "run.json")
        except FileNotFoundError:
            return False
        except OSError as error:
            self._folder_notes.append(f"run.json cannot be read: {_reason(error)}.")
            return False
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            described = (status.st_ino, status.st_size, status.st_mtime_ns)
            if described == self._described:
                return False
            text = file.read(SLICE)
        try:
            info = parse_json_object(text, "run.json", "", nan=True)
        except UserError:
            self._folder_notes.append("run.json is no JSON object: status and settings are unknown.")
            return False
        self.info, self._corrected = without_padding(info)
        self._described = described
        return True

    def _take(self, number: int, line: bytes) -> None:
        """Take in a line, or note what is wrong with it."""
        if not line.strip():
            return
        try:
            record = parse_json(line, "", "", nan=True, widest=WIDEST_COUNT)
        except UserError:
            self._broken_line(number, "is not JSON")
            return
        if not isinstance(record, dict):
            self._broken_line(number, "is no JSON object")
            return
        try:
            self._add(record)
        except _Unusable as error:
            self._broken_line(number, str(error))

    def _add(self, record: Record) -> None:
        """Add a record. One of a step before the newest is of a resumed run: what came after it was abandoned."""
        counters = [_number(record, key) for key in COUNTERS]
        for key, counter in zip(COUNTERS, counters, strict=True):
            if not counter >= 0:
                raise _Unusable(f"has no number for {key!r}")
        record = self._corrected(record)
        counters = [_number(record, key) for key in COUNTERS]
        training = [_number(record, key) for key in TRAINING] if TRAINING[0] in record else None
        validation = [_number(record, LOSS)] if LOSS in record else None
        step = counters[0]
        if step < self.step:
            self._training.drop_after(step)
            self._validation.drop_after(step)
            for scores in self._scores.values():
                scores.drop_after(step)
        self.step = int(step)
        if training is not None:
            self._training.add([*counters, *training])
            self._touched("training", self._training)
            self.mfu = _finite(_number(record, "train/mfu"))
        if validation is not None:
            self._validation.add([*counters, *validation])
            self._touched("validation", self._validation)
        for key in filter(score_of, record):
            if key in self._scores or len(self._scores) < _SCORES:
                self._scores.setdefault(key, Rows(len(COUNTERS) + 1)).add([*counters, _number(record, key)])

    def _touched(self, table: str, rows: Rows) -> None:
        self._unchanged[table] = min(self._unchanged[table], rows.count - 1)

    def _broken_line(self, number: int, what: str) -> None:
        self._broken += 1
        if len(self._line_notes) < _NOTES:
            self._line_notes.append(f"Line {number} of metrics.jsonl {what}: it is skipped.")

    def facts(self) -> dict[str, Any]:
        """Figures for the table, JSON-ready; null where not known. Times in seconds, `written` since 1970."""
        training, validation = self._training.table, self._validation.table
        steps, tokens = (
            count if isinstance(count, int) and not isinstance(count, bool) else None
            for count in (self.info.get("steps"), self.info.get("tokens"))
        )
        step_seconds, token_seconds, interval = self._pace()
        status = str(self.info.get("status") or "unknown") if self.step >= 0 else "waiting"
        left = None if steps is None or step_seconds is None else max(0, steps - self.step) * step_seconds
        if tokens is not None and token_seconds is not None:
            # On record where the batches of the steps differ: time goes with tokens.
            left = max(0.0, tokens - float(training[-1, COUNTERS.index("tokens")])) * token_seconds
        return {
            "folder": str(self.folder),
            "status": status,
            "step": max(self.step, 0),
            "steps": steps,
            "loss": _last(training[:, len(COUNTERS)]),
            "validation": _last(validation[:, len(COUNTERS)]),
            "throughput": _last(training[:, len(COUNTERS) + 1]),
            "share": _last(training[:, len(COUNTERS) + 2]),
            "mfu": self.mfu,
            "left": left if status == "running" else None,
            "interval": interval,
            "written": self._tail.written if self.step >= 0 else None,
            "notes": self.notes,
            "version": self.version,
        }

    def _pace(self) -> tuple[float | None, float | None, float | None]:
        """Seconds a step, a token, and from record to record, of the newest records."""
        recent = self._training.table[-_RECENT:]
        if len(recent) < 2:
            return None, None, None
        steps, tokens, seconds = recent[-1, :3] - recent[0, :3]
        per_step, per_token = (seconds / count if count > 0 else None for count in (steps, tokens))
        return per_step, per_token, seconds / (len(recent) - 1)

    def curves(self, scale: str) -> dict[str, NDArray[np.float32]]:
        """Thinned curves for axes of `scale`: name to [columns, points]; those of CURVES first, then those of scores.

        The columns are the counters of CURVES or SCORED, the values, and the mean of each value's bucket.
        """
        drawn = {}
        for curve, (key, columns) in CURVES.items():
            name = "validation" if key == LOSS else "training"
            table = (self._validation if key == LOSS else self._training).table
            value = len(COUNTERS) + (0 if key == LOSS else TRAINING.index(key))
            unchanged = min(self._unchanged[name], len(table))
            for each in SCALES:
                # Both scales see every change, so that the next one starts from the same rows.
                rows, means = self._thinned[curve, each].rows(table[:, value], unchanged)
                if each == scale:
                    wanted = [*(COUNTERS.index(column) for column in columns), value]
                    drawn[curve] = np.concatenate([table[rows][:, wanted].T, means[np.newaxis]]).astype("<f4")
        self._unchanged = {"training": self._training.count, "validation": self._validation.count}
        for key, scores in self._scores.items():
            # They are few: all are thinned anew.
            rows, means = Thinned(scale).rows(scores.table[:, -1], 0)
            drawn[key] = np.concatenate([scores.table[rows].T, means[np.newaxis]]).astype("<f4")
        return drawn


class _Unusable(Exception):
    """A record that does not tell what it must."""


def _number(record: Record, key: str) -> float:
    """A number of a record, nan where it is null, absent or beyond LARGEST. Raises _Unusable for anything else."""
    value = record.get(key)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Unusable(f"has no number for {key!r}")
    return float(value) if abs(value) <= LARGEST else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _last(values: NDArray[np.float64]) -> float | None:
    """The newest value, None without one."""
    return _finite(float(values[-1])) if len(values) else None


def _reason(error: OSError) -> str:
    """Reason in words for which a file cannot be read."""
    if error.errno == errno.ELOOP:
        return "it is a symbolic link, which is not followed"
    return error.strerror or str(error)
