"""The figures of a comparison as tables of finished text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sepllm_train.base.console import duration, flop_count, quantity
from sepllm_train.base.statistics import Interval, geometric_mean
from sepllm_train.compare.results import (
    AT_MOST,
    NOT_REACHED,
    REACHED,
    Ratio,
    Reach,
    Sweep,
    VariantAtTokens,
    VariantReach,
    common_tokens,
    difference,
    final_loss,
    mean,
    value_at,
)
from sepllm_train.compare.variants import Variant, differences, pairs, points, runs_of
from sepllm_train.runs.records import LOSS

Show = Callable[[float], str]
QUARTERS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Table:
    """A titled table of finished text; the first column names the row, the others hold figures."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Markdown with aligned columns, which reads as well on a terminal."""
        lines = [[cell.replace("|", "\\|") for cell in line] for line in [self.header, *self.rows]]
        widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(self.header))]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        padded = [
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
            for line in [lines[0], rule, *lines[1:]]
        ]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in padded) + "\n"

    def text(self, width: int) -> str:
        """Return the table for a terminal: in parts, each with the first column, where it is wider than `width`."""
        header, *lines = [self.header, *self.rows]
        widths = [max(3, *(len(line[i]) for line in [header, *lines])) + 3 for i in range(len(header))]
        parts: list[str] = []
        begin = 1
        while begin < len(header):
            end = begin + 1
            while end < len(header) and 1 + widths[0] + sum(widths[begin : end + 1]) <= width:
                end += 1
            title = f"{self.title} (continued)" if parts else self.title
            shown = [[line[0], *line[begin:end]] for line in (header, *lines)]
            parts.append(Table(title, shown[0], shown[1:]).markdown())
            begin = end
        return "\n".join(parts)


def several_seeds(variants: Sequence[Variant]) -> bool:
    """True if any variant has more than one run."""
    return any(variant.seeds > 1 for variant in variants)


def to_reach(variants: Sequence[Variant], reaches: Sequence[VariantReach], flops: str, target: str) -> Table:
    """Costs of each variant until the loss that `target` names, and their ratios to the first variant's."""
    lines = []
    for number, (variant, found) in enumerate(zip(variants, reaches, strict=True)):
        alone = len(found.runs) < 2
        line = _head(variant, variants)
        for column, (key, show) in enumerate(columns(flops)):
            ratio = ratio_text(found.ratios[key], reference=number == 0, bounds=not alone)
            line += [
                cost_text(found, key, show, first=column == 0),
                "" if alone and found.count(NOT_REACHED) else ratio,
            ]
        lines.append(line)
    names = [_seconds(variants) if key == "seconds" else key for key, _ in columns(flops)]
    ratios = [_ratio_title(found.ratios[key] for found in reaches[1:]) for key, _ in columns(flops)]
    header = [word for pair in zip(names, ratios, strict=True) for word in pair]
    return Table(f"To reach {target}", [*_head_title(variants), *header], lines)


def at_equal_tokens(variants: Sequence[Variant], equal: Sequence[VariantAtTokens], flops: str) -> Table:
    """Loss, bits per byte, FLOPs and seconds of each variant at one number of tokens."""
    lines = []
    for number, (variant, found) in enumerate(zip(variants, equal, strict=True)):
        change = "-" if number == 0 or found.difference is None else difference_text(found.difference)
        line = [
            *_head(variant, variants),
            f"{found.loss:.4f}",
            change,
            "-" if found.bits is None else f"{found.bits:.4f}",
        ]
        for key, show in columns(flops)[:2]:
            line += [show(found.costs[key]), ratio_text(found.ratios[key], reference=number == 0)]
        lines.append(line)
    later = equal[1:]
    measured = any(found.difference is not None and found.difference.low is not None for found in later)
    header = ["loss", "difference [95%]" if measured else "difference", "bits/byte"]
    header += [f"flops/{flops}", _ratio_title(found.ratios[f"flops/{flops}"] for found in later)]
    header += [_seconds(variants), _ratio_title(found.ratios["seconds"] for found in later)]
    return Table(f"At {quantity(equal[0].tokens)} tokens", [*_head_title(variants), *header], lines)


def by_learning_rate(sweep: Sweep) -> Table:
    """Return the loss of each variant of a sweep, and its distance to the best of those that differ in nothing else."""
    lines = []
    for curve in sweep.curves:
        for point in curve.points:
            change = "-"
            if curve.best is not None and point is not curve.best and point.loss is not None:
                found = difference(point.variant, curve.best.variant, value_at(sweep.tokens))
                change = "no pair" if found is None else difference_text(found)
            reached = f"{len(point.losses)} of {point.variant.seeds} seeds got there"
            loss = reached if point.loss is None else f"{point.loss:.4f}"
            change = "lowest" if point is curve.best else change
            lines.append([point.variant.label, f"{point.rate:g}", str(point.variant.seeds), loss, change])
    header = ["variant", "learning rate", "seeds", "loss", "over the lowest [95%]"]
    return Table(f"Validation loss at {quantity(sweep.tokens)} tokens by learning rate", header, lines)


def seed_by_seed(variants: Sequence[Variant], reaches: Sequence[VariantReach], flops: str) -> Table | None:
    """Every run's own costs to reach the loss and its ratio to its partner; None unless a variant has several runs."""
    if not several_seeds(variants):
        return None
    lines = []
    for variant, found in zip(variants, reaches, strict=True):
        paired = [run.label for run, _ in pairs(variant, variants[0])]
        final = {run.label: final_loss(run) for run in variant.runs}
        for run in found.runs:
            line = [variant.label, str(run.seed), f"{final[run.run]:.4f}", f"{run.target:.4f}"]
            for key, show in columns(flops):
                ratios = dict(zip(paired, found.ratios[key].seeds, strict=True))
                ratio = ratios.get(run.run)
                line += [run_cost(run, key, show), "-" if ratio is None else f"{ratio:.3f}x"]
            lines.append(line)
    header = ["variant", "seed", "final loss", "to reach", f"flops/{flops}", "ratio"]
    return Table("Seed by seed", [*header, _seconds(variants), "ratio", "tokens", "ratio"], lines)


def step_times(variants: Sequence[Variant]) -> Table | None:
    """Seconds of a step of each variant and its ratio to the first variant's; None without a timing file."""
    first = variants[0].timing
    if first is None:
        return None
    lines = []
    for variant in variants:
        if variant.timing is not None:
            ratio = "1.000x" if variant is variants[0] else estimate_text(variant.timing.ratio(first))
            lines.append([variant.label, f"{variant.timing.step_seconds:.4g}", ratio, str(len(variant.timing.rounds))])
    return Table("Timed steps", ["variant", "seconds of a step", "ratio [95%]", "rounds"], lines)


def along_tokens(variants: Sequence[Variant]) -> Table:
    """Mean loss of each variant, and its distance from the first's, at quarters of the tokens they share."""
    lines = []
    for share in QUARTERS:
        tokens = share * common_tokens(runs_of(variants))
        loss = value_at(tokens)
        losses = [mean(variant, loss) for variant in variants]
        if not any(math.isnan(loss) for loss in losses):
            line = [quantity(tokens), f"{losses[0]:.4f}"]
            for variant, other in zip(variants[1:], losses[1:], strict=True):
                change = difference(variant, variants[0], loss)
                line.append(f"{other:.4f} ({'-' if change is None else f'{change.mean:+.4f}'})")
            lines.append(line)
    return Table("Validation loss at equal tokens", ["tokens", *(variant.label for variant in variants)], lines)


def by_dataset(variants: Sequence[Variant]) -> Table | None:
    """Mean loss on each dataset of the blend at the most tokens the runs share; None unless there are several."""
    runs = runs_of(variants)
    names = [k for k in points(runs[0])[-1] if k.startswith("val/") and k.endswith("/loss") and k != LOSS]
    common = [name for name in names if all(len(points(run, name)) > 1 for run in runs)]
    if len(common) < 2:
        return None
    tokens = common_tokens(runs)
    lines = [
        [variant.label, *(f"{mean(variant, value_at(tokens, name, name)):.4f}" for name in common)]
        for variant in variants
    ]
    header = [_kind(variants), *(name.removeprefix("val/").removesuffix("/loss") for name in common)]
    return Table(f"Validation loss by dataset at {quantity(tokens)} tokens", header, lines)


def what_differs(variants: Sequence[Variant]) -> Table:
    """The settings in which the runs differ; several values within a variant stand side by side."""
    lines = []
    for name, values in differences(runs_of(variants)).items():
        rest = iter(values)
        cells = [dict.fromkeys(setting_text(next(rest)) for _ in variant.runs) for variant in variants]
        lines.append([name, *(" / ".join(cell) for cell in cells)])
    return Table(
        f"What differs between the {_kind(variants)}s", ["setting", *(variant.label for variant in variants)], lines
    )


def _kind(variants: Sequence[Variant]) -> str:
    """Name of what a line of a table is about."""
    return "variant" if several_seeds(variants) else "run"


def _head(variant: Variant, variants: Sequence[Variant]) -> list[str]:
    return [variant.label, str(variant.seeds)] if several_seeds(variants) else [variant.label]


def _head_title(variants: Sequence[Variant]) -> list[str]:
    return ["variant", "seeds"] if several_seeds(variants) else ["run"]


def _ratio_title(ratios: Iterable[Ratio]) -> str:
    """Says that there are intervals where there are."""
    return "ratio [95%]" if any(r.estimate is not None and r.estimate.low is not None for r in ratios) else "ratio"


def _seconds(variants: Sequence[Variant]) -> str:
    """Says which seconds they are."""
    return "seconds" if variants[0].timing is None else "seconds (timed steps)"


def columns(flops: str) -> list[tuple[str, Show]]:
    """Kinds of cost of a run: keys of the records with the way to show a number of each."""
    return [(f"flops/{flops}", flop_count), ("seconds", duration), ("tokens", quantity)]


def ratio_text(ratio: Ratio, reference: bool = False, bounds: bool = True) -> str:
    """A ratio with its interval; without an estimate its bounds, if these are asked for.

    `reference`: the ratio of the first variant to itself, whose interval would say nothing.
    """
    if ratio.estimate is not None:
        return f"{ratio.estimate.mean:.3f}x" if reference else estimate_text(ratio.estimate)
    found = [("at least", ratio.at_least), ("at most", ratio.at_most)] if bounds and not reference else []
    return ", ".join(f"{word} {bound:.3f}x" for word, bound in found if bound is not None) or "-"


def estimate_text(estimate: Interval) -> str:
    """A mean ratio and its interval."""
    interval = "" if estimate.low is None else f" [{estimate.low:.3f}, {estimate.high:.3f}]"
    return f"{estimate.mean:.3f}x{interval}"


def difference_text(estimate: Interval) -> str:
    """A mean difference of losses and its interval."""
    interval = "" if estimate.low is None else f" [{estimate.low:+.4f}, {estimate.high:+.4f}]"
    return f"{estimate.mean:+.4f}{interval}"


def cost_text(variant: VariantReach, key: str, show: Show, first: bool) -> str:
    """Cost of a variant; a loss that was not reached is reported in the `first` column of the costs."""
    cost = variant.costs[key]
    if cost is not None:
        return show(cost)
    if not variant.runs:
        return "no pair" if first else ""
    if variant.count(NOT_REACHED):
        return not_reached(variant) if first else ""
    return f"at most {show(geometric_mean([run.spent[key] for run in variant.runs]))}"


def not_reached(variant: VariantReach) -> str:
    """Number of runs of a variant that reached the loss, in words."""
    if len(variant.runs) == 1:
        return f"not reached (best {variant.runs[0].best:.4f})"
    return f"{variant.count(REACHED, AT_MOST)} of {len(variant.runs)} seeds reached it"


def run_cost(run: Reach, key: str, show: Show) -> str:
    """Cost of one run; its whole budget, as a lower bound, when it did not reach the loss."""
    word = {REACHED: "", AT_MOST: "at most ", NOT_REACHED: "over "}[run.state]
    return word + show(run.spent[key])


def setting_text(value: Any) -> str:
    """A setting of run.json."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
