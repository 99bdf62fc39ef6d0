"""Figures as the text of a table's cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sepllm_train.base.console import duration, quantity
from sepllm_train.compare.results import AT_MOST, NOT_REACHED, REACHED, Ratio, Reach, RowReach
from sepllm_train.compare.student import Estimate, geometric_mean

Show = Callable[[float], str]


def flops_text(value: float) -> str:
    """A number of FLOPs: 1.4e8 -> 140 MFLOPs."""
    figure = quantity(value)
    digits = figure.rstrip("kMGTPEZY")
    return f"{digits} {figure[len(digits) :]}FLOPs"


def columns(flops: str) -> list[tuple[str, Show]]:
    """What a run spends: keys of the records with the way to show a number of each."""
    return [(f"flops/{flops}", flops_text), ("seconds", duration), ("tokens", quantity)]


def ratio_text(ratio: Ratio, reference: bool = False, bounds: bool = True) -> str:
    """A ratio with its interval; without an estimate its bounds, if these are asked for.

    `reference`: the ratio of the first row to itself, whose interval would say nothing.
    """
    if ratio.estimate is not None:
        return f"{ratio.estimate.mean:.3f}x" if reference else estimate_text(ratio.estimate)
    found = [("at least", ratio.at_least), ("at most", ratio.at_most)] if bounds and not reference else []
    return ", ".join(f"{word} {bound:.3f}x" for word, bound in found if bound is not None) or "-"


def estimate_text(estimate: Estimate) -> str:
    """A mean ratio and its interval."""
    interval = "" if estimate.low is None else f" [{estimate.low:.3f}, {estimate.high:.3f}]"
    return f"{estimate.mean:.3f}x{interval}"


def difference_text(estimate: Estimate) -> str:
    """A mean difference of losses and its interval."""
    interval = "" if estimate.low is None else f" [{estimate.low:+.4f}, {estimate.high:+.4f}]"
    return f"{estimate.mean:+.4f}{interval}"


def cost_text(row: RowReach, key: str, show: Show, first: bool) -> str:
    """What a row spent; a loss that was not reached is told in the `first` column of the costs."""
    cost = row.costs[key]
    if cost is not None:
        return show(cost)
    if not row.runs:
        return "no pair" if first else ""
    if row.count(NOT_REACHED):
        return not_reached(row) if first else ""
    return f"at most {show(geometric_mean([run.spent[key] for run in row.runs]))}"


def not_reached(row: RowReach) -> str:
    """How many runs of a row reached the loss."""
    if len(row.runs) == 1:
        return f"not reached (best {row.runs[0].best:.4f})"
    return f"{row.count(REACHED, AT_MOST)} of {len(row.runs)} seeds reached it"


def run_cost(run: Reach, key: str, show: Show) -> str:
    """What one run spent; its whole budget, as a lower bound, when it did not reach the loss."""
    word = {REACHED: "", AT_MOST: "at most ", NOT_REACHED: "over "}[run.state]
    return word + show(run.spent[key])


def setting_text(value: Any) -> str:
    """A setting of run.json."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
