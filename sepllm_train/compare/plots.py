"""Figures of loss against what was spent, as SVG whose text stays text."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sepllm_train.compare.curves import points
from sepllm_train.compare.results import RowReach
from sepllm_train.compare.rows import Row, runs_of
from sepllm_train.metrics.flops import CONVENTIONS
from sepllm_train.runs.records import LOSS, Run

# Told apart on white, on black and by colour-blind readers; the markers and dashes go on where the colours end.
COLOURS = ("#1f77c9", "#d9601a", "#12936a", "#b152b0", "#a08000", "#d6477a", "#5b6fd8", "#7a7f87")
MARKERS = "os^Dv<>P"
# Colours of text and lines, which the page replaces by those of its theme.
INK, GRID = "#1a1c1f", "#d8dade"
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "sepllm-train",
}
DASHES = (0, (4, 3))
# The first part of training, where every loss falls from the same height, is left above the figure.
HIDDEN_START = 0.2
BAND = (
    "Lines are means over the seeds of a row, at the steps at which all of them were validated; the band reaches from "
    "the lowest seed to the highest, and each seed is a faint line. The band shows how far seeds lie apart, not how "
    "sure a difference is: rows are compared seed by seed, in the tables."
)


@dataclass(frozen=True)
class Axis:
    """A horizontal axis: key of the records, file name, title, and (size, label) of its units, the largest first."""

    key: str
    file: str
    title: str
    units: tuple[tuple[float, str], ...]

    def unit(self, largest: float) -> tuple[float, str]:
        """Unit in which the value `largest` has at least one and a half digits."""
        return next((unit for unit in self.units if largest >= 2 * unit[0]), self.units[-1])


def axes_of(flops: str, timed: bool = False) -> list[Axis]:
    """The horizontal axes of a comparison: FLOPs counted by the convention `flops`, seconds, tokens.

    `timed`: the seconds are steps times the seconds of a step from a timing file.
    """
    clock = "steps x timed seconds of a step" if timed else "validation and checkpoints left out"
    convention = f"flops/{flops}: {CONVENTIONS[flops].label}"
    operations = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1.0, ""))
    time = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
    count = ((1e9, ", billions"), (1e6, ", millions"), (1e3, ", thousands"), (1.0, ""))
    return [
        Axis(
            f"flops/{flops}",
            "loss_vs_flops",
            "Loss against FLOPs",
            tuple((size, f"training {prefix}FLOPs ({convention})") for size, prefix in operations),
        ),
        Axis(
            "seconds",
            "loss_vs_seconds",
            "Loss against time",
            tuple((size, f"training time, {unit} ({clock})") for size, unit in time),
        ),
        Axis(
            "tokens",
            "loss_vs_tokens",
            "Loss against tokens",
            tuple((size, f"training tokens{unit}") for size, unit in count),
        ),
    ]


def draw(rows: Sequence[Row], axis: Axis, reaches: Sequence[RowReach], loss: float) -> Figure:
    """Validation loss of every row, and what it spent to reach the loss of `reaches`, whose mean is `loss`.

    Of a row of one run the training loss is faintly behind; of several runs these are faintly behind their mean, in a
    band from the lowest to the highest.
    """
    runs = runs_of(rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.4), layout="constrained")
        plot = figure.add_subplot()
        spent = max(points(run)[-1][axis.key] for run in runs)
        size, label = axis.unit(spent)
        for number, (row, found) in enumerate(zip(rows, reaches, strict=True)):
            _draw_row(plot, row, number, axis.key, size)
            cost = found.costs[axis.key]
            if cost is not None:
                colour = COLOURS[number % len(COLOURS)]
                plot.vlines(cost / size, 0, loss, color=colour, linewidth=1, linestyle=DASHES)
        plot.axhline(loss, color=INK, linewidth=0.8, linestyle=DASHES, zorder=1)
        # At the left, where every curve is still far above.
        plot.annotate(
            f"{loss:.4f}",
            (0, loss),
            xycoords=("axes fraction", "data"),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=9,
        )
        plot.set_xlim(0, 1.03 * spent / size)
        plot.set_ylim(*_loss_range(runs, axis.key, spent, loss))
        plot.set_xlabel(label)
        plot.set_ylabel("loss (nats per token)")
        plot.set_title(axis.title, loc="left", fontsize=11, fontweight="bold")
        plot.grid(color=GRID, linewidth=0.6)
        plot.set_axisbelow(True)
        plot.spines[["top", "right"]].set_visible(False)
        plot.tick_params(length=0)
        plot.legend(frameon=False, loc="upper right", title=_legend_title(rows), alignment="right")
    return figure


def _legend_title(rows: Sequence[Row]) -> str:
    """What the lines and what is faint behind them are."""
    if all(row.seeds == 1 for row in rows):
        return "validation (faint: training, averaged)"
    return "validation, mean of seeds\n(faint: each seed; band: lowest to highest)"


def _draw_row(plot: Axes, row: Row, number: int, key: str, size: float) -> None:
    """Curves of one row; `size` is the unit of the horizontal axis."""
    colour = COLOURS[number % len(COLOURS)]
    if row.seeds == 1:
        spent, training = _training_curve(row.runs[0], key)
        plot.plot([x / size for x in spent], training, color=colour, linewidth=0.8, alpha=0.35)
        label = row.label
    else:
        for run in row.runs:
            own = points(run)
            losses = [record[LOSS] for record in own]
            plot.plot([record[key] / size for record in own], losses, color=colour, linewidth=0.7, alpha=0.4, zorder=2)
        label = f"{row.label} ({row.seeds} seeds)"
    curve = mean_curve(row, key)
    x = [point.spent / size for point in curve]
    if row.seeds > 1:
        lows, highs = [point.low for point in curve], [point.high for point in curve]
        plot.fill_between(x, lows, highs, color=colour, alpha=0.18, linewidth=0, zorder=2)
    plot.plot(
        x,
        [point.loss for point in curve],
        color=colour,
        linewidth=1.8,
        linestyle="-" if number < len(COLOURS) else "--",
        marker=MARKERS[number % len(MARKERS)] if len(curve) <= 60 else None,
        markersize=4.5,
        label=label,
        zorder=3,
    )


@dataclass(frozen=True)
class CurvePoint:
    """Mean over the runs of a row at one step: what was spent, the loss, its lowest and its highest."""

    spent: float
    loss: float
    low: float
    high: float


def mean_curve(row: Row, key: str) -> list[CurvePoint]:
    """The row's points at the steps at which all of its runs were validated."""
    curves = [{record["step"]: record for record in points(run)} for run in row.runs]
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    found = []
    for step in shared:
        losses = [curve[step][LOSS] for curve in curves]
        found.append(CurvePoint(fmean(curve[step][key] for curve in curves), fmean(losses), min(losses), max(losses)))
    return found


def _training_curve(run: Run, key: str, most: int = 100) -> tuple[list[float], list[float]]:
    """Training losses over `key`, neighbouring steps averaged down to at most `most` points."""
    records = [record for record in run.training if math.isfinite(record["train/loss"])]
    chunk = max(1, math.ceil(len(records) / most))
    groups = [records[start : start + chunk] for start in range(0, len(records), chunk)]
    spent = [fmean(record[key] for record in group) for group in groups]
    return spent, [fmean(record["train/loss"] for record in group) for group in groups]


def _loss_range(runs: Sequence[Run], key: str, spent: float, loss: float) -> tuple[float, float]:
    """Lowest and highest loss to show: all points but those of the start of training, and the loss to reach."""
    losses = [record[LOSS] for run in runs for record in points(run)[1:] if record[key] >= HIDDEN_START * spent]
    low, high = min([*losses, loss]), max([*losses, loss])
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def svg(figure: Figure) -> str:
    """The figure as a standalone SVG on white."""
    target = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(target, format="svg", metadata={"Date": None})
    return target.getvalue()


def inline(drawing: str, prefix: str) -> str:
    """An SVG made for the inside of a page: no prologue, ids of its own, no background, the page's ink and grid."""
    body = drawing[drawing.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", body)
    body = re.sub(r"fill: #ffffff", "fill: none", body)
    body = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", body, count=1)
    body = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", body, count=1)
    return body.replace(INK, "currentColor").replace(GRID, "var(--grid)")
