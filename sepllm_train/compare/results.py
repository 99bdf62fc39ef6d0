"""The figures of a comparison as data: costs to reach a loss, and losses at equal tokens, paired by seed.

Every ratio is taken between two runs of the same seed (see `variants.pairs`) and averaged as `base.statistics` says.
The difference of two losses in nats is the logarithm of a ratio of perplexities, so it is averaged as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from statistics import fmean
from typing import Any

from sepllm_train.base.statistics import Interval, estimate, geometric_mean, ratio_estimate
from sepllm_train.compare.timing import Timing, VariantTiming
from sepllm_train.compare.variants import Variant, pairs, points, runs_of, settings_of
from sepllm_train.runs.records import CUMULATIVE, LOSS, Record, Run

BITS = "val/bits_per_byte"
REACHED, AT_MOST, NOT_REACHED = "reached", "at most", "not reached"
# Lowest and highest possible value; the same twice when it is known.
Bounds = tuple[float, float]
# Learning rates from which on runs that differ in nothing else are a sweep.
SWEEP = 3


@dataclass(frozen=True)
class Reach:
    """Costs of one run until it first had the validation loss `target` (nats per token), by the names of CUMULATIVE.

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
    """A variant over the reference: `seeds` holds the ratio of each pair, None where it is not known exactly.

    `estimate` is None unless all are known. `at_least` and `at_most` then bound the geometric mean over the pairs; each
    is None where there is no such bound.
    """

    seeds: list[float | None]
    estimate: Interval | None
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class VariantReach:
    """Costs of a variant until it reached a loss: geometric means, None unless every run reached it exactly."""

    label: str
    runs: list[Reach]
    costs: dict[str, float | None]
    ratios: dict[str, Ratio]

    def count(self, *states: str) -> int:
        """Number of runs in one of these states."""
        return sum(run.state in states for run in self.runs)


@dataclass(frozen=True)
class VariantAtTokens:
    """A variant at one number of tokens: means over its runs, and pairs against the reference.

    `loss` in nats per token, `bits` in bits per byte (None when not logged), `difference` of losses (None without a
    pair); `costs` and `ratios` by the names of CUMULATIVE.
    """

    label: str
    tokens: float
    losses: dict[str, float]
    loss: float
    bits: float | None
    difference: Interval | None
    costs: dict[str, float]
    ratios: dict[str, Ratio]


def timed(variants: Sequence[Variant], timing: Timing) -> list[Variant]:
    """Return the variants with the seconds of every record replaced by steps times the variant's seconds of a step.

    Those of a curriculum are summed over its phases.

    Raises UserError for a variant that the timing does not hold.
    """

    def clocked(run: Run, own: VariantTiming) -> Run:
        training, validation = (
            [{**record, "seconds": own.seconds_at(record["step"])} for record in records]
            for records in (run.training, run.validation)
        )
        return replace(run, training=training, validation=validation)

    found = [timing.of(variant.label, [run.label for run in variant.runs]) for variant in variants]
    return [
        Variant(variant.label, [clocked(run, own) for run in variant.runs], own)
        for variant, own in zip(variants, found, strict=True)
    ]


def to_reach(variants: Sequence[Variant], loss: float | None) -> list[VariantReach]:
    """Return what each variant spent to reach validation loss `loss`; None: the reference's final one, seed by seed.

    With None, a run without a partner in the reference has no loss to reach and is not among the runs of its variant.
    """
    reference = variants[0]
    return [_variant_reach(variant, reference, loss) for variant in variants]


def at_equal_tokens(variants: Sequence[Variant], tokens: float | None = None) -> list[VariantAtTokens]:
    """Loss, bits per byte and costs of each variant at `tokens`, by default the most that all runs share."""
    tokens = common_tokens(runs_of(variants)) if tokens is None else tokens
    return [_variant_at_tokens(variant, variants[0], tokens) for variant in variants]


def difference(variant: Variant, reference: Variant, value: Callable[[Run], float]) -> Interval | None:
    """Mean of `value` of a run minus that of its partner in the reference; None without a pair."""
    found = [value(run) - value(partner) for run, partner in pairs(variant, reference)]
    return estimate(found) if found else None


def mean(variant: Variant, value: Callable[[Run], float]) -> float:
    """Arithmetic mean of `value` over the runs of a variant."""
    return fmean(value(run) for run in variant.runs)


def value_at(tokens: float, key: str = LOSS, metric: str = LOSS) -> Callable[[Run], float]:
    """`at_tokens` as a function of the run alone."""
    return lambda run: at_tokens(run, tokens, key, metric)


def _variant_reach(variant: Variant, reference: Variant, loss: float | None) -> VariantReach:
    targets = [
        (run, partner, final_loss(partner) if loss is None else loss) for run, partner in pairs(variant, reference)
    ]
    both = [(reach(run, target), reach(partner, target)) for run, partner, target in targets]
    runs = [ours for ours, _ in both] if loss is None else [reach(run, loss) for run in variant.runs]
    exact = bool(runs) and all(found.state == REACHED for found in runs)
    return VariantReach(
        label=variant.label,
        runs=runs,
        costs={key: geometric_mean([run.spent[key] for run in runs]) if exact else None for key in CUMULATIVE},
        ratios={
            key: _paired(variant, reference, key, [(a.bounds(key), b.bounds(key)) for a, b in both])
            for key in CUMULATIVE
        },
    )


def reach(run: Run, target: float) -> Reach:
    """Costs of a run until it first had validation loss `target`."""
    found = first_reach(run, target)
    if found is None:
        last = points(run)[-1]
        return Reach(run.label, run.seed, target, best_loss(run), NOT_REACHED, {key: last[key] for key in CUMULATIVE})
    return Reach(run.label, run.seed, target, best_loss(run), REACHED if found.exact else AT_MOST, found.spent)


def _variant_at_tokens(variant: Variant, reference: Variant, tokens: float) -> VariantAtTokens:
    def spent(run: Run, key: str) -> Bounds:
        return (at_tokens(run, tokens, key),) * 2

    paired = pairs(variant, reference)
    loss = value_at(tokens)
    bits = mean(variant, value_at(tokens, BITS, BITS))
    return VariantAtTokens(
        label=variant.label,
        tokens=tokens,
        losses={run.label: loss(run) for run in variant.runs},
        loss=mean(variant, loss),
        bits=None if math.isnan(bits) else bits,
        difference=difference(variant, reference, loss),
        costs={key: geometric_mean([at_tokens(run, tokens, key) for run in variant.runs]) for key in CUMULATIVE},
        ratios={
            key: _paired(variant, reference, key, [(spent(a, key), spent(b, key)) for a, b in paired])
            for key in CUMULATIVE
        },
    )


def _paired(variant: Variant, reference: Variant, key: str, costs: Sequence[tuple[Bounds, Bounds]]) -> Ratio:
    """Ratio of the costs `key` of each pair.

    With timings the seconds are steps times seconds of a step: the ratio is that of the steps, over the pairs, times
    that of the seconds of a step, over the rounds; both add to its interval.
    """
    if key != "seconds" or variant.timing is None or reference.timing is None:
        return _ratio(costs)
    ours, theirs = variant.timing.step_seconds, reference.timing.step_seconds
    steps = [((a[0] / ours, a[1] / ours), (b[0] / theirs, b[1] / theirs)) for a, b in costs]
    return _ratio(steps, variant.timing.turn_ratios(reference.timing))


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


@dataclass(frozen=True)
class FirstReach:
    """Costs of a run when it first had a loss, by the names of CUMULATIVE.

    `exact` is False when already the first validation point is below that loss: the true cost is at most this.
    """

    spent: dict[str, float]
    exact: bool


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


def first_reach(run: Run, loss: float) -> FirstReach | None:
    """Find the point at which the validation loss was first `loss` or lower; None when it never was."""
    before: Record | None = None
    for after in points(run):
        if after[LOSS] <= loss:
            if before is None:
                return FirstReach({key: after[key] for key in CUMULATIVE}, exact=after[LOSS] == loss)
            share = (before[LOSS] - loss) / (before[LOSS] - after[LOSS])
            return FirstReach({key: _between(before, after, key, share) for key in CUMULATIVE}, exact=True)
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


@dataclass(frozen=True)
class SweepPoint:
    """A variant of a sweep at its learning rate `rate`: `losses` of the seeds that reached the sweep's tokens.

    `loss` is their mean, None unless all seeds got there.
    """

    variant: Variant
    rate: float
    losses: list[float]
    loss: float | None


@dataclass(frozen=True)
class SweepCurve:
    """The variants that differ in the learning rate alone, in its order; `label` is empty when there are no others."""

    label: str
    points: list[SweepPoint]

    @property
    def best(self) -> SweepPoint | None:
        """The point of the lowest mean loss."""
        whole = [(point.loss, point) for point in self.points if point.loss is not None]
        return min(whole, key=lambda pair: pair[0])[1] if whole else None


@dataclass(frozen=True)
class Sweep:
    """Validation losses after `tokens` tokens, by learning rate."""

    tokens: float
    curves: list[SweepCurve]

    def data(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return {
            "tokens": self.tokens,
            "curves": [
                {
                    "label": curve.label,
                    "best": None if curve.best is None else curve.best.rate,
                    "points": [
                        {"row": point.variant.label, "lr": point.rate, "losses": point.losses, "loss": point.loss}
                        for point in curve.points
                    ],
                }
                for curve in self.curves
            ],
        }


def find_sweep(variants: Sequence[Variant]) -> Sweep | None:
    """Return the sweep that the variants form; None unless each has at least SWEEP learning rates and nothing else.

    The losses are those at the most tokens that all seeds of one variant reached: a run that diverged or was stopped
    does not move them.
    """
    groups: dict[str, dict[float, Variant]] = {}
    for variant in variants:
        found = settings_of(variant.runs[0].folder, without_rate=True)
        if found is None or math.isnan(found[1]) or found[1] in groups.setdefault(found[0], {}):
            return None
        groups[found[0]][found[1]] = variant
    if any(len(group) < SWEEP for group in groups.values()):
        return None
    tokens = max(common_tokens(variant.runs) for variant in variants)
    labels = [_stem(group.values()) if len(groups) > 1 else "" for group in groups.values()]
    return Sweep(
        tokens,
        [
            SweepCurve(label, [_sweep_point(variant, rate, tokens) for rate, variant in sorted(group.items())])
            for label, group in zip(labels, groups.values(), strict=True)
        ],
    )


def _sweep_point(variant: Variant, rate: float, tokens: float) -> SweepPoint:
    losses = [loss for run in variant.runs if not math.isnan(loss := at_tokens(run, tokens))]
    return SweepPoint(variant, rate, losses, fmean(losses) if len(losses) == variant.seeds else None)


def _stem(variants: Iterable[Variant]) -> str:
    """Beginning that the labels of variants share, without what belongs to the learning rate."""
    labels = [variant.label for variant in variants]
    start = "".join(same[0] for same in takewhile(lambda one: len(set(one)) == 1, zip(*labels, strict=False)))
    return re.sub(r"[-_.]?(lr)?[-_.]?[\d.]*$", "", start) or labels[0]
