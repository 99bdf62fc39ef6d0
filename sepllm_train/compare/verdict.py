"""What a comparison shows, in one paragraph that claims no more than its seeds carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sepllm_train.base.console import quantity
from sepllm_train.compare.cells import columns, ratio_text
from sepllm_train.compare.results import AT_MOST, NOT_REACHED, REACHED, RowAtTokens, RowReach
from sepllm_train.compare.rows import Row, pairs
from sepllm_train.compare.student import Estimate

ONE_RUN = (
    "how much another seed would move these ratios is not known from it, so repeat with other seeds before concluding "
    "anything from a small difference."
)


@dataclass(frozen=True)
class Findings:
    """What the paragraph is written from: rows with their figures, and the convention.

    `target` is the loss to reach in words, `again` how it is called from the second time on.
    """

    rows: Sequence[Row]
    reaches: Sequence[RowReach]
    equal: Sequence[RowAtTokens]
    target: str
    again: str
    flops: str

    def costs(self) -> list[tuple[str, str, str, str]]:
        """Key of each cost, its name after a ratio, and what less and more of it are called."""
        timed = self.rows[0].timing is not None
        names = [
            (f"FLOPs (flops/{self.flops})", "fewer FLOPs", "more FLOPs"),
            ("timed seconds" if timed else "seconds", "less time", "more time"),
            ("tokens", "fewer tokens", "more tokens"),
        ]
        return [(key, *words) for (key, _), words in zip(columns(self.flops), names, strict=True)]


def verdict(findings: Findings) -> str:
    """Sentences on each later row against the first, and on what the number of seeds allows to say.

    Only a difference whose 95% interval excludes none is called one. The intervals are each row's own: they are not
    corrected for the number of rows, and the paragraph says so when there are several.
    """
    rows = findings.rows
    numbers = [len(pairs(row, rows[0])) for row in rows[1:]]
    parts = []
    for index, count in enumerate(numbers, start=1):
        write = _unpaired if count == 0 else _one_pair if count == 1 else _several_pairs
        parts.append(write(findings, index))
        if count:
            findings = replace(findings, target=findings.again)
    if any(count > 1 for count in numbers):
        parts.append(_intervals(sum(count > 1 for count in numbers)))
    single = [row.label for row, count in zip(rows[1:], numbers, strict=True) if count == 1]
    if single and len(single) == len(numbers):
        parts.append(f"This is one run of each: {ONE_RUN}")
    elif single:
        parts.append(f"Of {_listed(single)} this is one run against one of {rows[0].label}: {ONE_RUN}")
    return " ".join(parts)


def _unpaired(findings: Findings, index: int) -> str:
    return f"{findings.rows[index].label} has no seed in common with {findings.rows[0].label}: nothing is said of it."


def _one_pair(findings: Findings, index: int) -> str:
    """A pair of runs: ratios without an interval."""
    label, reference = findings.rows[index].label, findings.rows[0].label
    ours, theirs = findings.reaches[index], findings.reaches[0]
    if all(ours.ratios[key].estimate is not None for key, _, _, _ in findings.costs()):
        ratios = [f"{ratio_text(ours.ratios[key])} the {name}" for key, name, _, _ in findings.costs()]
        return f"{label} reached {findings.target} with {_listed(ratios)} of {reference}."
    missing = [row.label for row in (theirs, ours) if row.count(NOT_REACHED)]
    if missing:
        return f"{_listed(missing)} did not reach {findings.target}."
    return f"{label}: {findings.target} lies above a first validation point, so the costs are only bounds."


def _several_pairs(findings: Findings, index: int) -> str:
    """Several pairs: ratios with intervals, or bounds when a run did not reach the loss, and the losses."""
    label, reference = findings.rows[index].label, findings.rows[0].label
    ours, theirs = findings.reaches[index], findings.reaches[0]
    seeds = len(pairs(findings.rows[index], findings.rows[0]))
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
    told = [f"it took {_listed(shown)}"] if shown else []
    told += [f"no difference in {_listed(open_, 'or')} is shown"] if open_ else []
    return (
        f"Over {seeds} seeds, {label} reached {findings.target} with {_listed(ratios)} of {reference}: "
        f"{'; '.join(told)}. {_losses(findings, index)}"
    )


def _bounds(findings: Findings, ours: RowReach, theirs: RowReach, seeds: int) -> str:
    """Runs that did not reach the loss, or had it from the start: no mean, but what bounds it."""
    missing = [row for row in (theirs, ours) if row.count(NOT_REACHED)]
    if missing:
        counts = [f"{row.count(REACHED, AT_MOST)} of {len(row.runs)} seeds of {row.label}" for row in missing]
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
    """How the intervals are made, and what several rows do to them."""
    text = "Intervals are 95% by Student's t over pairs of runs of the same seed"
    if compared == 1:
        return f"{text}."
    return (
        f"{text}, each row's for itself: they are not corrected for the {compared} rows compared, of which one may "
        "well show a difference by chance."
    )


def _with_interval(estimate: Estimate) -> str:
    if estimate.low is None:
        return f"{estimate.mean:.3f}x"
    return f"{estimate.mean:.3f}x (95% interval {estimate.low:.3f} to {estimate.high:.3f})"


def _listed(words: Sequence[str], last: str = "and") -> str:
    """a, b and c."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""
