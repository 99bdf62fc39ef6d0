"""The verdict of a comparison: one paragraph that claims no more than its seeds carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sepllm_train.base.console import quantity
from sepllm_train.base.statistics import Interval
from sepllm_train.compare.results import (
    AT_MOST,
    NOT_REACHED,
    REACHED,
    Sweep,
    SweepCurve,
    VariantAtTokens,
    VariantReach,
    difference,
    value_at,
)
from sepllm_train.compare.tables import columns, ratio_text
from sepllm_train.compare.variants import Variant, pairs

ONE_RUN = (
    "how much another seed would move these ratios is not known from it, so repeat with other seeds before concluding "
    "anything from a small difference."
)


@dataclass(frozen=True)
class Findings:
    """Input of the verdict: variants with their figures, and the convention.

    `target` is the loss to reach in words, `again` how it is called from the second time on.
    """

    variants: Sequence[Variant]
    reaches: Sequence[VariantReach]
    equal: Sequence[VariantAtTokens]
    target: str
    again: str
    flops: str

    def costs(self) -> list[tuple[str, str, str, str]]:
        """Key of each cost, its name after a ratio, and what less and more of it are called."""
        timed = self.variants[0].timing is not None
        names = [
            (f"FLOPs (flops/{self.flops})", "fewer FLOPs", "more FLOPs"),
            ("timed seconds" if timed else "seconds", "less time", "more time"),
            ("tokens", "fewer tokens", "more tokens"),
        ]
        return [(key, *words) for (key, _), words in zip(columns(self.flops), names, strict=True)]


def verdict(findings: Findings) -> str:
    """Sentences on each later variant against the first, and on what the number of seeds allows to say.

    Only a difference whose 95% interval excludes none is called one. The intervals are each variant's own: they are not
    corrected for the number of variants, and the paragraph says so when there are several.
    """
    variants = findings.variants
    numbers = [len(pairs(variant, variants[0])) for variant in variants[1:]]
    parts = []
    for index, count in enumerate(numbers, start=1):
        write = _unpaired if count == 0 else _one_pair if count == 1 else _several_pairs
        parts.append(write(findings, index))
        if count:
            findings = replace(findings, target=findings.again)
    if any(count > 1 for count in numbers):
        parts.append(_intervals(sum(count > 1 for count in numbers)))
    single = [variant.label for variant, count in zip(variants[1:], numbers, strict=True) if count == 1]
    if single and len(single) == len(numbers):
        parts.append(f"This is one run of each: {ONE_RUN}")
    elif single:
        parts.append(f"Of {_listed(single)} this is one run against one of {variants[0].label}: {ONE_RUN}")
    return " ".join(parts)


def _unpaired(findings: Findings, index: int) -> str:
    label, reference = findings.variants[index].label, findings.variants[0].label
    return f"{label} has no seed in common with {reference}: nothing is said of it."


def _one_pair(findings: Findings, index: int) -> str:
    """A pair of runs: ratios without an interval."""
    label, reference = findings.variants[index].label, findings.variants[0].label
    ours, theirs = findings.reaches[index], findings.reaches[0]
    if all(ours.ratios[key].estimate is not None for key, _, _, _ in findings.costs()):
        ratios = [f"{ratio_text(ours.ratios[key])} the {name}" for key, name, _, _ in findings.costs()]
        return f"{label} reached {findings.target} with {_listed(ratios)} of {reference}."
    missing = [variant.label for variant in (theirs, ours) if variant.count(NOT_REACHED)]
    if missing:
        return f"{_listed(missing)} did not reach {findings.target}."
    return f"{label}: {findings.target} lies above a first validation point, so the costs are only bounds."


def _several_pairs(findings: Findings, index: int) -> str:
    """Several pairs: ratios with intervals, or bounds when a run did not reach the loss, and the losses."""
    label, reference = findings.variants[index].label, findings.variants[0].label
    ours, theirs = findings.reaches[index], findings.reaches[0]
    seeds = len(pairs(findings.variants[index], findings.variants[0]))
    estimates = [ours.ratios[key].estimate for key, _, _, _ in findings.costs()]
    if any(estimate is None for estimate in estimates):
        return f"{_bounds(findings, ours, theirs, seeds)} {_losses(findings, index)}"
    ratios = [
        f"{_with_interval(estimate)} the {name}"
        for estimate, (_, name, _, _) in zip(estimates, findings.costs(), strict=True)
        if estimate is not None
    ]
    shown, open_ = [], []
    for estimate, (_, _, fewer, more) in zip(estimates, findings.costs(), strict=True):
        differs = estimate is not None and estimate.excludes(1)
        if differs:
            shown.append(fewer if estimate is not None and estimate.mean < 1 else more)
        else:
            open_.append(fewer.split()[-1])
    clauses = [f"it took {_listed(shown)}"] if shown else []
    clauses += [f"no difference in {_listed(open_, 'or')} is shown"] if open_ else []
    return (
        f"Over {seeds} seeds, {label} reached {findings.target} with {_listed(ratios)} of {reference}: "
        f"{'; '.join(clauses)}. {_losses(findings, index)}"
    )


def _bounds(findings: Findings, ours: VariantReach, theirs: VariantReach, seeds: int) -> str:
    """Runs that did not reach the loss, or had it from the start: no mean, but what bounds it."""
    missing = [variant for variant in (theirs, ours) if variant.count(NOT_REACHED)]
    if missing:
        counts = [
            f"{variant.count(REACHED, AT_MOST)} of {len(variant.runs)} seeds of {variant.label}" for variant in missing
        ]
        begin = f"{_listed(counts)} reached {findings.target} within their budget, so no mean is claimed"
    else:
        begin = f"{ours.label}: {findings.target} lies above a first validation point, so no mean is claimed"
    bounds = [
        f"{text} the {name}"
        for key, name, _, _ in findings.costs()
        if (text := ratio_text(ours.ratios[key])) != "-" and ours.ratios[key].estimate is None
    ]
    if not bounds:
        return f"{begin}, and nothing bounds it."
    return f"{begin}: over {seeds} seeds {ours.label} took on average {_listed(bounds)} of {theirs.label}."


def _losses(findings: Findings, index: int) -> str:
    """The difference of the losses at equal tokens, if one is shown."""
    found = findings.equal[index]
    change = found.difference
    if change is None or change.low is None:
        return ""
    interval = f"{change.mean:+.4f}, 95% interval {change.low:+.4f} to {change.high:+.4f}"
    at = f"At {quantity(found.tokens)} tokens"
    if not change.excludes(0):
        return f"{at} no difference in validation loss is shown ({interval})."
    return f"{at} its validation loss is {'lower' if change.mean < 0 else 'higher'} ({interval})."


def _intervals(compared: int) -> str:
    """Sentence on the intervals, and on what several variants do to them."""
    text = "Intervals are 95% by Student's t over pairs of runs of the same seed"
    if compared == 1:
        return f"{text}."
    return (
        f"{text}, each variant's for itself: they are not corrected for the {compared} variants compared, of which one "
        "may well show a difference by chance."
    )


def _with_interval(estimate: Interval) -> str:
    if estimate.low is None:
        return f"{estimate.mean:.3f}x"
    return f"{estimate.mean:.3f}x (95% interval {estimate.low:.3f} to {estimate.high:.3f})"


def _listed(words: Sequence[str], last: str = "and") -> str:
    """a, b and c."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""


def sweep_verdict(sweep: Sweep) -> str:
    """Return sentences on the best learning rate, on the rates that are not shown to be worse, and on the sweep's ends.

    Of several curves, those of all other settings, the losses at their best rates are compared with the first one's.
    """
    parts = [_best_rate(sweep, curve) for curve in sweep.curves]
    first = sweep.curves[0]
    for curve in sweep.curves[1:]:
        if curve.best is None or first.best is None:
            continue
        change = difference(curve.best.variant, first.best.variant, value_at(sweep.tokens))
        if change is not None and change.low is not None:
            words = "lower than" if change.mean < 0 else "higher than"
            shown = words if change.excludes(0) else "not shown to differ from"
            interval = f"{change.mean:+.4f}, 95% interval {change.low:+.4f} to {change.high:+.4f}"
            parts.append(f"At its own best rate the loss of {curve.label} is {shown} {first.label}'s ({interval}).")
    several = any(point.variant.seeds > 1 for curve in sweep.curves for point in curve.points)
    if several:
        parts.append(
            "Intervals are 95% by Student's t over pairs of runs of the same seed, not corrected for the number of "
            "learning rates."
        )
    else:
        parts.append("This is one run of each: another seed may well make another rate the best.")
    return " ".join(parts)


def _best_rate(sweep: Sweep, curve: SweepCurve) -> str:
    """Sentence on one curve of a sweep."""
    name, best = f"{curve.label}: " if curve.label else "", curve.best
    if best is None or best.loss is None:
        return f"{name}with no learning rate did all seeds reach {quantity(sweep.tokens)} tokens."
    seeds = f", mean of {best.variant.seeds} seeds" if best.variant.seeds > 1 else ""
    text = (
        f"{name}the lowest validation loss at {quantity(sweep.tokens)} tokens, {best.loss:.4f}{seeds}, is that of "
        f"learning rate {best.rate:g}"
    )
    text = text[0].upper() + text[1:] if not name else text
    others = [point for point in curve.points if point is not best and point.loss is not None]
    changes = {p.rate: difference(p.variant, best.variant, value_at(sweep.tokens)) for p in others}
    open_ = [f"{rate:g}" for rate, change in changes.items() if change is not None and not change.excludes(0)]
    if open_ and best.variant.seeds > 1:
        text += f"; {_listed(open_)} {'is' if len(open_) == 1 else 'are'} not shown to be worse"
    gone = [f"{point.rate:g}" for point in curve.points if point.loss is None]
    if gone:
        text += f"; not all seeds got there with {_listed(gone)}"
    end = {curve.points[0].rate: "low", curve.points[-1].rate: "high"}.get(best.rate)
    return f"{text}." if end is None else f"{text}. It is the {end}est rate of the sweep: try {end}er ones."
