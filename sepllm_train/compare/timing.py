"""Seconds of a step from a timing benchmark, in place of the seconds that the runs themselves took.

Runs that share a machine with other work take longer whenever that work does. A benchmark that trains steps of all rows
in turns in one process gives seconds that compare:

    {"rows": {LABEL: {"step_seconds": MEDIAN, "turns": [SECONDS, ...]}, ...}, "machine": {...}}

`turns` are the seconds of a step in each turn, the n-th of all rows belonging together. A row whose sequences grow in
the course of a run has `phases` besides, {"last": STEP, "step_seconds": MEDIAN} each; its other seconds are means over
the steps of the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sepllm_train.base.errors import UserError
from sepllm_train.compare.student import Estimate, ratio_estimate

FILE = "timing.json"


@dataclass(frozen=True)
class RowTiming:
    """Seconds of a step: the median, and one value per turn. `phases`: last step of each phase and its seconds of a
    step, where they differ."""

    step_seconds: float
    turns: tuple[float, ...]
    phases: tuple[tuple[int, float], ...] = ()

    def seconds_at(self, step: int) -> float:
        """Seconds of the first `step` steps."""
        seconds, done = 0.0, 0
        for last, own in self.phases:
            seconds += (min(step, last) - done) * own
            done = min(step, last)
        return seconds + (step - done) * self.step_seconds

    def turn_ratios(self, reference: RowTiming) -> list[float]:
        """Seconds of a step over the reference's, turn by turn."""
        return [ours / theirs for ours, theirs in zip(self.turns, reference.turns, strict=True)]

    def ratio(self, reference: RowTiming) -> Estimate:
        """Geometric mean of the turns' ratios, with its interval."""
        return ratio_estimate(self.turn_ratios(reference))


@dataclass(frozen=True)
class Timing:
    """A timing file: `rows` by label, and what it tells about the machine."""

    path: Path
    rows: dict[str, RowTiming]
    machine: dict[str, Any]

    def of(self, label: str, names: Sequence[str]) -> RowTiming:
        """Timing of the row called `label`, or of one of its runs' `names`; raises UserError when it has none."""
        for name in (label, *names):
            if name in self.rows:
                return self.rows[name]
        raise UserError(f"--timing {self.path} has no row {label!r}: it holds {', '.join(self.rows)}.")

    def words(self) -> str:
        """Where the seconds come from, in words for a reader."""
        turns = len(next(iter(self.rows.values())).turns)
        machine = ", ".join(f"{key} {value}" for key, value in self.machine.items() if value not in (None, ""))
        where = f" ({machine})" if machine else ""
        phased = [label for label, row in self.rows.items() if row.phases]
        sums = f" Those of {', '.join(phased)} are summed over phases that were timed apart." if phased else ""
        return (
            f"Seconds are steps times the seconds of a step, timed in {turns} turn{'' if turns == 1 else 's'} of all "
            f"rows in one process{where}, not the seconds the runs took.{sums}"
        )


def read_timing(path: Path) -> Timing:
    """Read a timing file, or timing.json of a folder. Raises UserError when it is missing or not of this form."""
    path = path / FILE if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise UserError(f"--timing {path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"--timing {path} is not JSON: {error}.") from None
    found = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found:
        raise UserError(f"--timing {path} has no 'rows' object that names a row.")
    rows = {str(label): _row(value, f"--timing {path}: row {label!r}") for label, value in found.items()}
    counts = {label: len(row.turns) for label, row in rows.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{label} {count}" for label, count in counts.items())
        raise UserError(f"--timing {path} has rows of different numbers of turns ({told}): time them in one process.")
    machine = content.get("machine")
    return Timing(path, rows, machine if isinstance(machine, dict) else {})


def _row(value: Any, where: str) -> RowTiming:
    """A row of the file. Raises UserError unless it holds positive seconds."""
    turns = value.get("turns") if isinstance(value, dict) else None
    if not isinstance(turns, list) or not turns or not all(_is_time(turn) for turn in turns):
        raise UserError(f"{where} needs 'turns', a list of seconds above 0.")
    if not _is_time(value.get("step_seconds")):
        raise UserError(f"{where} needs 'step_seconds', a number above 0.")
    return RowTiming(
        float(value["step_seconds"]),
        tuple(float(turn) for turn in turns),
        _phases(value.get("phases", []), where),
    )


def _phases(value: Any, where: str) -> tuple[tuple[int, float], ...]:
    """The phases of a row. Raises UserError unless each has positive seconds and ends after the one before."""
    try:
        phases = tuple((int(phase["last"]), float(phase["step_seconds"])) for phase in value)
    except (KeyError, TypeError, ValueError):
        phases = ((0, 0.0),)
    before = 0
    for last, seconds in phases:
        if last <= before or not _is_time(seconds):
            raise UserError(f"{where}: 'phases' need rising steps as 'last' and 'step_seconds' above 0.")
        before = last
    return phases


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
