"""The paired ratios of every row with their intervals, in one figure."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sepllm_train.compare.plots import COLOURS, DASHES, GRID, INK, STYLE
from sepllm_train.compare.results import Ratio, RowReach
from sepllm_train.compare.rows import Row


def has_intervals(reaches: Sequence[RowReach]) -> bool:
    """Whether there is an interval to draw."""
    return any(
        ratio.estimate is not None and ratio.estimate.low is not None
        for found in reaches[1:]
        for ratio in found.ratios.values()
    )


def draw(rows: Sequence[Row], reaches: Sequence[RowReach], flops: str, target: str) -> Figure:
    """One panel per cost, one line per later row: seeds as dots, mean and interval, arrows for bounds."""
    later = list(zip(rows, reaches, strict=True))[1:]
    seconds = "seconds" if rows[0].timing is None else "seconds (timed steps)"
    panels = [(f"flops/{flops}", f"FLOPs (flops/{flops})"), ("seconds", seconds), ("tokens", "tokens")]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 1.5 + 0.42 * len(later)), layout="constrained")
        plots = figure.subplots(1, len(panels), sharey=True)
        for plot, (key, title) in zip(plots, panels, strict=True):
            plot.axvline(1, color=INK, linewidth=0.8, linestyle=DASHES, zorder=1)
            for number, (_, found) in enumerate(later):
                _draw_ratio(plot, found.ratios[key], number)
            plot.set_title(title, loc="left", fontsize=10)
            plot.grid(axis="x", color=GRID, linewidth=0.6)
            plot.set_axisbelow(True)
            plot.spines[["top", "right", "left"]].set_visible(False)
            plot.tick_params(length=0)
            plot.margins(x=0.12)
        plots[0].set_yticks(range(len(later)), [row.label for row, _ in later])
        plots[0].set_ylim(len(later) - 0.5, -0.5)
        figure.suptitle(
            f"Ratio to {rows[0].label}, to reach {target}", x=0.01, ha="left", fontsize=11, fontweight="bold"
        )
        figure.supxlabel(
            "bar: mean and 95% interval over pairs of the same seed, dots: pairs, arrow: bound", fontsize=9
        )
    return figure


def _draw_ratio(plot: Axes, ratio: Ratio, number: int) -> None:
    """A row's ratio at height `number`."""
    colour = COLOURS[(number + 1) % len(COLOURS)]
    known = [value for value in ratio.seeds if value is not None]
    plot.plot(known, [number + 0.18] * len(known), "o", color=colour, markersize=3, alpha=0.55)
    found = ratio.estimate
    if found is not None:
        plot.plot([found.mean], [number], "D", color=colour, markersize=5, zorder=3)
        if found.low is not None and found.high is not None:
            plot.plot([found.low, found.high], [number, number], color=colour, linewidth=2)
        return
    for bound, marker in ((ratio.at_least, ">"), (ratio.at_most, "<")):
        if bound is not None:
            plot.plot([bound], [number], marker, color=colour, markersize=7)
