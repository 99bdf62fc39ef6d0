"""Curves of validation points: when a loss was first reached, and the loss at a number of tokens.

Between neighbouring validation points loss, tokens, seconds and FLOPs are taken to move along a straight line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from sepllm_train.base.errors import UserError
from sepllm_train.runs.records import CUMULATIVE, LOSS, Record, Run


@dataclass(frozen=True)
class Reached:
    """What a run had spent when it first had a loss, by the names of CUMULATIVE.

    `exact` is False when already the first validation point is below that loss: the true cost is at most this.
    """

    spent: dict[str, float]
    exact: bool


def points(run: Run, metric: str = LOSS) -> list[Record]:
    """Validation records at which `metric` is a finite number, in the order of steps."""
    return [record for record in run.validation if math.isfinite(record.get(metric, math.nan))]


def check_length(run: Run) -> None:
    """Raise UserError unless a run has two validation points."""
    found = len(points(run))
    if found < 2:
        raise UserError(
            f"{run.metrics_file} has {found} validation point{'' if found == 1 else 's'} with a finite val/loss "
            f"and a curve needs two: {run.gap or 'train longer or lower training.validation_interval'}."
        )


def check_curves(runs: Sequence[Run]) -> None:
    """Raise UserError unless every run has two validation points, and all share a range of tokens."""
    for run in runs:
        check_length(run)
    late = max(runs, key=lambda run: points(run)[0]["tokens"])
    short = min(runs, key=lambda run: points(run)[-1]["tokens"])
    if points(late)[0]["tokens"] > points(short)[-1]["tokens"]:
        raise UserError(
            f"The runs have no tokens in common: {short.folder} was last validated at {points(short)[-1]['tokens']:,} "
            f"tokens and {late.folder} first at {points(late)[0]['tokens']:,}."
        )


def best_loss(run: Run) -> float:
    """Lowest validation loss of a run (nats per token)."""
    return min(record[LOSS] for record in points(run))


def final_loss(run: Run) -> float:
    """Validation loss of the last validation point of a run (nats per token)."""
    return float(points(run)[-1][LOSS])


def common_loss(runs: Sequence[Run]) -> float:
    """The lowest validation loss that every run has reached."""
    return max(best_loss(run) for run in runs)


def common_tokens(runs: Sequence[Run]) -> float:
    """The most tokens up to which every run has been validated."""
    return min(points(run)[-1]["tokens"] for run in runs)


def first_reach(run: Run, loss: float) -> Reached | None:
    """When the validation loss was first `loss` or lower; None when it never was."""
    before: Record | None = None
    for after in points(run):
        if after[LOSS] <= loss:
            if before is None:
                return Reached({key: after[key] for key in CUMULATIVE}, exact=after[LOSS] == loss)
            share = (before[LOSS] - loss) / (before[LOSS] - after[LOSS])
            return Reached({key: _between(before, after, key, share) for key in CUMULATIVE}, exact=True)
        before = after
    return None


def at_tokens(run: Run, tokens: float, key: str = LOSS, metric: str = LOSS) -> float:
    """`key` of a run at `tokens`, from its validation points with a finite `metric`; nan outside their range."""
    curve = points(run, metric)
    for before, after in pairwise(curve):
        if before["tokens"] <= tokens <= after["tokens"] and before["tokens"] < after["tokens"]:
            share = (tokens - before["tokens"]) / (after["tokens"] - before["tokens"])
            return _between(before, after, key, share)
    return math.nan


def _between(before: Record, after: Record, key: str, share: float) -> float:
    return before.get(key, math.nan) + share * (after.get(key, math.nan) - before.get(key, math.nan))
