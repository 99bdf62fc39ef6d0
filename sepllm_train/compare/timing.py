"""Seconds of a step from a timing benchmark, in place of the seconds that the runs themselves took.

Runs that share a machine with other work take longer whenever that work does. A benchmark that trains steps of all
variants in interleaved rounds in one process gives seconds that compare:

    {"rows": {LABEL: {"step_seconds": MEDIAN, "turns": [SECONDS, ...]}, ...}, "machine": {...}}

`rows` are the variants, `turns` the seconds of a step in each round, the n-th of all variants belonging together. A
variant whose sequences grow in the course of a run has `phases` besides, {"last": STEP, "step_seconds": MEDIAN} each;
its other seconds are means over the steps of the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sepllm_train.base.errors import UserError
from sepllm_train.base.parsing import read_json
from sepllm_train.base.statistics import Interval, ratio_estimate

FILE = "timing.json"


@dataclass(frozen=True)
class VariantTiming:
    """Seconds of a step: the median, and one value per round. `phases`: last step of each phase and its seconds of a
    step, where they differ."""

    step_seconds: float
    rounds: tuple[float, ...]
    phases: tuple[tuple[int, float], ...] = ()

    def data(self) -> dict[str, Any]:
        """The figures as comparison.json and timing.json name them."""
        return {"step_seconds": self.step_seconds, "turns": self.rounds, "phases": self.phases}

    def seconds_at(self, step: int) -> float:
        """Seconds of the first `step` steps."""
        seconds, done = 0.0, 0
        for last, own in self.phases:
            seconds += (min(step, last) - done) * own
            done = min(step, last)
        return seconds + (step - done) * self.step_seconds

    def turn_ratios(self, reference: VariantTiming) -> list[float]:
        """Seconds of a step over the reference's, round by round."""
        return [ours / theirs for ours, theirs in zip(self.rounds, reference.rounds, strict=True)]

    def ratio(self, reference: VariantTiming) -> Interval:
        """Geometric mean of the rounds' ratios, with its interval."""
        return ratio_estimate(self.turn_ratios(reference))


@dataclass(frozen=True)
class Timing:
    """A timing file: `variants` by label, and what it records of the machine."""

    path: Path
    variants: dict[str, VariantTiming]
    machine: dict[str, Any]

    def of(self, label: str, names: Sequence[str]) -> VariantTiming:
        """Timing of the variant called `label`, or of one of its runs' `names`; raises UserError when it has none."""
        for name in (label, *names):
            if name in self.variants:
                return self.variants[name]
        raise UserError(f"--timing {self.path} has no row {label!r}: it holds {', '.join(self.variants)}.")

    def words(self) -> str:
        """Source of the seconds, in words for a reader."""
        rounds = len(next(iter(self.variants.values())).rounds)
        machine = ", ".join(f"{key} {value}" for key, value in self.machine.items() if value not in (None, ""))
        where = f" ({machine})" if machine else ""
        phased = [label for label, variant in self.variants.items() if variant.phases]
        sums = f" Those of {', '.join(phased)} are summed over phases that were timed apart." if phased else ""
        return (
            f"Seconds are steps times the seconds of a step, timed in {rounds} round{'' if rounds == 1 else 's'} of "
            f"all variants in one process{where}, not the seconds the runs took.{sums}"
        )


def read_timing(path: Path) -> Timing:
    """Read a timing file, or timing.json of a folder. Raises UserError when it is missing or not of this form."""
    path = path / FILE if path.is_dir() else path
    content = read_json(path, "give --timing the file of a timing benchmark, or its folder")
    found = content.get("rows")
    if not isinstance(found, dict) or not found:
        raise UserError(f"--timing {path} has no 'rows' object that names a row.")
    variants = {str(label): _variant(value, f"--timing {path}: row {label!r}") for label, value in found.items()}
    counts = {label: len(variant.rounds) for label, variant in variants.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{label} {count}" for label, count in counts.items())
        raise UserError(f"--timing {path} has rows of different numbers of turns ({listed}): time them in one process.")
    machine = content.get("machine")
    return Timing(path, variants, machine if isinstance(machine, dict) else {})


def _variant(value: Any, where: str) -> VariantTiming:
    """A variant of the file. Raises UserError unless it holds positive seconds."""
    rounds = value.get("turns") if isinstance(value, dict) else None
    if not isinstance(rounds, list) or not rounds or not all(_is_time(round) for round in rounds):
        raise UserError(f"{where} needs 'turns', a list of seconds above 0.")
    if not _is_time(value.get("step_seconds")):
        raise UserError(f"{where} needs 'step_seconds', a number above 0.")
    return VariantTiming(
        float(value["step_seconds"]),
        tuple(float(round) for round in rounds),
        _phases(value.get("phases", []), where),
    )


def _phases(value: Any, where: str) -> tuple[tuple[int, float], ...]:
    """The phases of a variant. Raises UserError unless each has positive seconds and ends after the one before."""
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
