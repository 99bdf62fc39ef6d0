"""The figures of a comparison as data: costs to reach a loss, and losses at equal tokens, paired by seed.

Every ratio is taken between two runs of the same seed (see `rows.pairs`) and averaged as `student` says. The
difference of two losses in nats is the logarithm of a ratio of perplexities, so it is averaged as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from sepllm_train.compare.curves import at_tokens, best_loss, common_tokens, final_loss, first_reach, points
from sepllm_train.compare.rows import Row, pairs, runs_of
from sepllm_train.compare.student import Estimate, estimate, geometric_mean, ratio_estimate
from sepllm_train.compare.timing import RowTiming, Timing
from sepllm_train.runs.records import CUMULATIVE, LOSS, Run

BITS = "val/bits_per_byte"
REACHED, AT_MOST, NOT_REACHED = "reached", "at most", "not reached"
# Lowest and highest possible value; the same twice when it is known.
Bounds = tuple[float, float]


@dataclass(frozen=True)
class Reach:
    """What one run spent to first have the validation loss `target` (nats per token), by the names of CUMULATIVE.

    `state` is REACHED; AT_MOST when already the first validation point is below the target, so that `spent` is an upper
    bound; or NOT_REACHED: then `spent` is the whole budget, which is a lower bound.
    """

    run: str
    seed: int | None
    target: float
    best: float
    state: str
    spent: dict[str, float]

    def bounds(self, key: str) -> Bounds:
        """Lowest and highest possible cost."""
        spent = self.spent[key]
        return (0.0 if self.state == AT_MOST else spent, math.inf if self.state == NOT_REACHED else spent)


@dataclass(frozen=True)
class Ratio:
    """A row over the reference: `seeds` holds the ratio of each pair, None where it is not known exactly.

    `estimate` is None unless all are known. `at_least` and `at_most` then bound the geometric mean over the pairs; each
    is None where there is no such bound.
    """

    seeds: list[float | None]
    estimate: Estimate | None
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class RowReach:
    """What a row spent to reach a loss: `costs` are geometric means, None unless every run reached it exactly."""

    label: str
    runs: list[Reach]
    costs: dict[str, float | None]
    ratios: dict[str, Ratio]

    def count(self, *states: str) -> int:
        """Number of runs in one of these states."""
        return sum(run.state in states for run in self.runs)


@dataclass(frozen=True)
class RowAtTokens:
    """A row at one number of tokens: means over its runs, and pairs against the reference.

    `loss` in nats per token, `bits` in bits per byte (None when not logged), `difference` of losses (None without a
    pair); `costs` and `ratios` by the names of CUMULATIVE.
    """

    label: str
    tokens: float
    losses: dict[str, float]
    loss: float
    bits: float | None
    difference: Estimate | None
    costs: dict[str, float]
    ratios: dict[str, Ratio]


def timed(rows: Sequence[Row], timing: Timing) -> list[Row]:
    """The rows with the seconds of every record replaced by its steps times the row's seconds of a step, those of a
    curriculum summed over its phases.

    Raises UserError for a row that the timing does not hold.
    """

    def clocked(run: Run, own: RowTiming) -> Run:
        training, validation = (
            [{**record, "seconds": own.seconds_at(record["step"])} for record in records]
            for records in (run.training, run.validation)
        )
        return replace(run, training=training, validation=validation)

    found = [timing.of(row.label, [run.label for run in row.runs]) for row in rows]
    return [Row(row.label, [clocked(run, own) for run in row.runs], own) for row, own in zip(rows, found, strict=True)]


def to_reach(rows: Sequence[Row], loss: float | None) -> list[RowReach]:
    """What each row spent to reach validation loss `loss`; None is the final loss of the reference's run of its seed.

    With None, a run without a partner in the reference has no loss to reach and is not among the runs of its row.
    """
    reference = rows[0]
    return [_row_reach(row, reference, loss) for row in rows]


def at_equal_tokens(rows: Sequence[Row], tokens: float | None = None) -> list[RowAtTokens]:
    """Loss, bits per byte and costs of each row at `tokens`, by default the most that all runs share."""
    tokens = common_tokens(runs_of(rows)) if tokens is None else tokens
    return [_row_at_tokens(row, rows[0], tokens) for row in rows]


def difference(row: Row, reference: Row, value: Callable[[Run], float]) -> Estimate | None:
    """Mean of `value` of a run minus that of its partner in the reference; None without a pair."""
    found = [value(run) - value(partner) for run, partner in pairs(row, reference)]
    return estimate(found) if found else None


def mean(row: Row, value: Callable[[Run], float]) -> float:
    """Arithmetic mean of `value` over the runs of a row."""
    return fmean(value(run) for run in row.runs)


def value_at(tokens: float, key: str = LOSS, metric: str = LOSS) -> Callable[[Run], float]:
    """`curves.at_tokens` as a function of the run alone."""
    return lambda run: at_tokens(run, tokens, key, metric)


def _row_reach(row: Row, reference: Row, loss: float | None) -> RowReach:
    targets = [(run, partner, final_loss(partner) if loss is None else loss) for run, partner in pairs(row, reference)]
    both = [(reach(run, target), reach(partner, target)) for run, partner, target in targets]
    runs = [ours for ours, _ in both] if loss is None else [reach(run, loss) for run in row.runs]
    exact = bool(runs) and all(found.state == REACHED for found in runs)
    return RowReach(
        label=row.label,
        runs=runs,
        costs={key: geometric_mean([run.spent[key] for run in runs]) if exact else None for key in CUMULATIVE},
        ratios={
            key: _paired(row, reference, key, [(a.bounds(key), b.bounds(key)) for a, b in both]) for key in CUMULATIVE
        },
    )


def reach(run: Run, target: float) -> Reach:
    """When a run first had validation loss `target`."""
    found = first_reach(run, target)
    if found is None:
        last = points(run)[-1]
        return Reach(run.label, run.seed, target, best_loss(run), NOT_REACHED, {key: last[key] for key in CUMULATIVE})
    return Reach(run.label, run.seed, target, best_loss(run), REACHED if found.exact else AT_MOST, found.spent)


def _row_at_tokens(row: Row, reference: Row, tokens: float) -> RowAtTokens:
    def spent(run: Run, key: str) -> Bounds:
        return (at_tokens(run, tokens, key),) * 2

    paired = pairs(row, reference)
    loss = value_at(tokens)
    bits = mean(row, value_at(tokens, BITS, BITS))
    return RowAtTokens(
        label=row.label,
        tokens=tokens,
        losses={run.label: loss(run) for run in row.runs},
        loss=mean(row, loss),
        bits=None if math.isnan(bits) else bits,
        difference=difference(row, reference, loss),
        costs={key: geometric_mean([at_tokens(run, tokens, key) for run in row.runs]) for key in CUMULATIVE},
        ratios={
            key: _paired(row, reference, key, [(spent(a, key), spent(b, key)) for a, b in paired]) for key in CUMULATIVE
        },
    )


def _paired(row: Row, reference: Row, key: str, costs: Sequence[tuple[Bounds, Bounds]]) -> Ratio:
    """Ratio of the costs `key` of each pair.

    With timings the seconds are steps times seconds of a step: the ratio is that of the steps, over the pairs, times
    that of the seconds of a step, over the turns; both add to its interval.
    """
    if key != "seconds" or row.timing is None or reference.timing is None:
        return _ratio(costs)
    ours, theirs = row.timing.step_seconds, reference.timing.step_seconds
    steps = [((a[0] / ours, a[1] / ours), (b[0] / theirs, b[1] / theirs)) for a, b in costs]
    return _ratio(steps, row.timing.turn_ratios(reference.timing))


def _ratio(costs: Sequence[tuple[Bounds, Bounds]], factors: Sequence[float] = ()) -> Ratio:
    """Ratio of each pair's costs, times the geometric mean of `factors` if there are any."""
    factor = geometric_mean(factors) if factors else 1.0
    ranges = [_range(cost, other) for cost, other in costs]
    known = [low for low, high in ranges if low == high]
    seeds = [factor * low if low == high else None for low, high in ranges]
    if ranges and len(known) == len(ranges):
        return Ratio(seeds, ratio_estimate(known, factors) if factors else ratio_estimate(known))
    least, most = (factor * geometric_mean([r[side] for r in ranges]) if ranges else math.inf for side in (0, 1))
    return Ratio(seeds, None, least if 0 < least < math.inf else None, most if most < math.inf else None)


def _range(cost: Bounds, other: Bounds) -> Bounds:
    """Lowest and highest ratio of two costs of which the lowest and highest are known; nothing is known beside 0."""
    (low, high), (other_low, other_high) = cost, other
    if high == 0 or other_high == 0:
        return 0.0, math.inf
    return (
        0.0 if other_high == math.inf else low / other_high,
        math.inf if other_low == 0 or high == math.inf else high / other_low,
    )
