"""Figures of a comparison: loss against what was spent, ratios with their intervals, loss against learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from sepllm_train.base.console import quantity
from sepllm_train.base.figures import (
    COLOURS,
    DASHES,
    FAINT,
    INK,
    MARKERS,
    WIDTH,
    dressed,
    headline,
    legend_below,
    picture,
)
from sepllm_train.compare.results import Ratio, Sweep, VariantReach
from sepllm_train.compare.variants import Variant, points, runs_of
from sepllm_train.metrics.flops import CONVENTIONS
from sepllm_train.runs.records import LOSS, Run

# The first part of training, where every loss falls from the same height, is left above the figure.
HIDDEN_START = 0.2
# Bands and lines that can be told apart in one panel; more variants get a panel each, so many side by side.
_BANDS, _LINES = 2, 4
_COLUMNS = 3
# Height of a row of panels and of the legend under them, inches.
_PANEL, _LEGEND = 2.2, 0.55
BAND = (
    "Lines are means over the seeds of a variant, at the steps at which all of them were validated; the band reaches "
    "from the lowest seed to the highest, and each seed is a faint line. The band shows how far seeds lie apart, not "
    "how sure a difference is: variants are compared seed by seed, in the tables."
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
    """Return the horizontal axes of a comparison: FLOPs counted by the convention `flops`, seconds, tokens.

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


@dataclass(frozen=True)
class CurvePoint:
    """Mean over the runs of a variant at one step: what was spent, the loss, its lowest and its highest."""

    spent: float
    loss: float
    low: float
    high: float


def mean_curve(variant: Variant, key: str, metric: str = LOSS) -> list[CurvePoint]:
    """Return the variant's points at the steps at which all of its runs have `metric`, the loss of a point."""
    curves = [{record["step"]: record for record in points(run, metric)} for run in variant.runs]
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    found = []
    for step in shared:
        losses = [curve[step][metric] for curve in curves]
        found.append(CurvePoint(fmean(curve[step][key] for curve in curves), fmean(losses), min(losses), max(losses)))
    return found


def draw_curves(
    variants: Sequence[Variant], axis: Axis, reaches: Sequence[VariantReach] = (), loss: float | None = None
) -> Figure:
    """Draw the validation loss of every variant, and what it spent to reach the loss of `reaches` (mean: `loss`).

    The training loss of a variant of one run is faintly behind; several runs are faintly behind their mean, in a band
    from the lowest to the highest. More variants than can be told apart in one panel get a panel each, after the
    reference, whose mean is in all of them.
    """
    runs = runs_of(variants)
    spent = max(points(run)[-1][axis.key] for run in runs)
    size, label = axis.unit(spent)
    low, high = _loss_range(runs, axis.key, spent, loss)

    def panel(plot: Axes, shown: Sequence[int]) -> None:
        for number in shown:
            _draw_variant(plot, variants[number], number, axis.key, size, marked=not apart)
            cost = reaches[number].costs[axis.key] if reaches else None
            if cost is not None and loss is not None:
                plot.vlines(cost / size, 0, loss, color=_colour(number), linewidth=1, linestyle=DASHES)
        if loss is not None:
            plot.axhline(loss, color=INK, linewidth=0.8, linestyle=DASHES, zorder=1)
            if not apart:
                # At the left, where every curve is still far above.
                at = ("axes fraction", "data")
                plot.annotate(
                    f"{loss:.4f}", (0, loss), xycoords=at, xytext=(4, 4), textcoords="offset points", fontsize=9
                )
        plot.set_xlim(0, 1.03 * spent / size)
        plot.set_ylim(low, high)

    def draw_together(figure: Figure) -> None:
        plot = dressed(figure.add_subplot(), axis.title, label, "loss (nats per token)")
        panel(plot, range(len(variants)))
        legend_below(figure, title=_legend_title(variants))

    def draw_apart(figure: Figure) -> None:
        parts: Any = figure.subfigures(2, 1, height_ratios=(height - _LEGEND, _LEGEND))
        upper, lower = parts
        plots = list(upper.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
        for plot, number in zip(plots, range(1, len(variants)), strict=False):
            dressed(plot, "", "", "").set_title(_name(variants[number]), loc="left", fontsize=10)
            for other in range(1, len(variants)):
                _draw_mean(plot, variants[other], axis.key, size, color=FAINT, linewidth=0.8, zorder=1)
            panel(plot, (0, number))
        for place in range(len(variants) - 1, len(plots)):
            plots[place].set_visible(False)
            plots[place - columns].tick_params(labelbottom=True)
        headline(upper, axis.title)
        upper.supxlabel(label, fontsize=10)
        upper.supylabel("loss (nats per token)", fontsize=10)
        handles = [Line2D([], [], color=colour) for colour in (_colour(0), FAINT)]
        names = [_name(variants[0]), "the variants of the other panels"]
        if loss is not None:
            handles.append(Line2D([], [], color=INK, linewidth=0.8, linestyle=DASHES))
            names.append(f"loss to reach, {loss:.4f}")
        legend_below(lower, title=_legend_title(variants), handles=handles, labels=names)

    apart = len(variants) > (_BANDS if any(variant.seeds > 1 for variant in variants) else _LINES)
    columns = min(_COLUMNS, len(variants) - 1)
    lines = math.ceil((len(variants) - 1) / columns)
    height = 1.0 + _LEGEND + _PANEL * lines if apart else 4.9
    return picture((WIDTH, height), draw_apart if apart else draw_together)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _name(variant: Variant) -> str:
    return variant.label if variant.seeds == 1 else f"{variant.label} ({variant.seeds} seeds)"


def _legend_title(variants: Sequence[Variant]) -> str:
    """Meaning of the lines and of what is faint behind them."""
    if all(variant.seeds == 1 for variant in variants):
        return "validation (faint: training, averaged)"
    return "validation, mean of seeds (faint: each seed; band: lowest to highest)"


def _draw_variant(plot: Axes, variant: Variant, number: int, key: str, size: float, *, marked: bool) -> None:
    """Draw the curves of one variant; `size` is the unit of the horizontal axis."""
    colour = _colour(number)
    if variant.seeds == 1:
        spent, training = _training_curve(variant.runs[0], key)
        plot.plot([x / size for x in spent], training, color=colour, linewidth=0.8, alpha=0.35)
    else:
        for run in variant.runs:
            own = points(run)
            losses = [record[LOSS] for record in own]
            plot.plot([record[key] / size for record in own], losses, color=colour, linewidth=0.7, alpha=0.4, zorder=2)
        curve = mean_curve(variant, key)
        lows, highs = [point.low for point in curve], [point.high for point in curve]
        plot.fill_between([p.spent / size for p in curve], lows, highs, color=colour, alpha=0.18, linewidth=0, zorder=2)
    marker = MARKERS[number % len(MARKERS)] if marked and len(points(variant.runs[0])) <= 60 else None
    _draw_mean(plot, variant, key, size, color=colour, linewidth=1.8, marker=marker, markersize=4, label=_name(variant))


def _draw_mean(plot: Axes, variant: Variant, key: str, size: float, **style: object) -> None:
    curve = mean_curve(variant, key)
    plot.plot([point.spent / size for point in curve], [point.loss for point in curve], **{"zorder": 3, **style})  # type: ignore[arg-type]


def _training_curve(run: Run, key: str, most: int = 100) -> tuple[list[float], list[float]]:
    """Training losses over `key`, neighbouring steps averaged down to at most `most` points."""
    records = [record for record in run.training if math.isfinite(record["train/loss"])]
    chunk = max(1, math.ceil(len(records) / most))
    groups = [records[start : start + chunk] for start in range(0, len(records), chunk)]
    spent = [fmean(record[key] for record in group) for group in groups]
    return spent, [fmean(record["train/loss"] for record in group) for group in groups]


def _loss_range(runs: Sequence[Run], key: str, spent: float, loss: float | None) -> tuple[float, float]:
    """Lowest and highest loss to show: all points but those of the start of training, and the loss to reach."""
    losses = [record[LOSS] for run in runs for record in points(run)[1:] if record[key] >= HIDDEN_START * spent]
    shown = losses if loss is None else [*losses, loss]
    low, high = min(shown), max(shown)
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def draw_scores(variants: Sequence[Variant], axis: Axis, metric: str, name: str) -> Figure:
    """Draw the score `metric` (key of the records), called `name`, of every variant: the mean of its seeds, and a band
    from the lowest to the highest."""
    size, label = axis.unit(max(points(run, metric)[-1][axis.key] for run in runs_of(variants)))

    def draw(figure: Figure) -> None:
        plot = dressed(figure.add_subplot(), f"{name} against FLOPs", label, name)
        for number, variant in enumerate(variants):
            curve = mean_curve(variant, axis.key, metric)
            spent, colour = [point.spent / size for point in curve], _colour(number)
            if variant.seeds > 1:
                lows, highs = [point.low for point in curve], [point.high for point in curve]
                plot.fill_between(spent, lows, highs, color=colour, alpha=0.18, linewidth=0)
            marker = MARKERS[number % len(MARKERS)]
            scores = [point.loss for point in curve]
            plot.plot(spent, scores, color=colour, marker=marker, markersize=4, linewidth=1.8, label=_name(variant))
        plot.set_xlim(left=0)
        several = any(variant.seeds > 1 for variant in variants)
        legend_below(figure, title="mean of seeds (band: lowest to highest)" if several else None)

    return picture((WIDTH, 4.6), draw)


def has_intervals(reaches: Sequence[VariantReach]) -> bool:
    """True if there is an interval to draw."""
    return any(
        ratio.estimate is not None and ratio.estimate.low is not None
        for found in reaches[1:]
        for ratio in found.ratios.values()
    )


def draw_ratios(variants: Sequence[Variant], reaches: Sequence[VariantReach], flops: str, target: str) -> Figure:
    """Draw a panel per cost, a line per later variant: seeds as dots, mean and interval, arrows for bounds."""
    later = list(zip(variants, reaches, strict=True))[1:]
    seconds = "seconds" if variants[0].timing is None else "seconds (timed steps)"
    panels = [(f"flops/{flops}", f"FLOPs (flops/{flops})"), ("seconds", seconds), ("tokens", "tokens")]

    def draw(figure: Figure) -> None:
        plots = figure.subplots(1, len(panels), sharey=True)
        for plot, (key, title) in zip(plots, panels, strict=True):
            plot.axvline(1, color=INK, linewidth=0.8, linestyle=DASHES, zorder=1)
            for number, (_, found) in enumerate(later):
                _draw_ratio(plot, found.ratios[key], number)
            dressed(plot, "", "", "", axis="x").set_title(title, loc="left", fontsize=10)
            plot.spines["left"].set_visible(False)
            plot.margins(x=0.12)
        plots[0].set_yticks(range(len(later)), [variant.label for variant, _ in later])
        plots[0].set_ylim(len(later) - 0.5, -0.5)
        headline(figure, f"Ratio to {variants[0].label}, to reach {target}")
        words = "diamond and line: mean and 95% interval over pairs of the same seed; dots: pairs; arrow: bound"
        figure.supxlabel(words, fontsize=9)

    return picture((WIDTH, 1.7 + 0.42 * len(later)), draw)


def _draw_ratio(plot: Axes, ratio: Ratio, number: int) -> None:
    """Draw a variant's ratio at height `number`."""
    colour = _colour(number + 1)
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


def draw_sweep(sweep: Sweep) -> Figure:
    """Draw the loss of a sweep against the learning rate: means as lines, seeds as dots, a ring at the lowest mean."""

    def draw(figure: Figure) -> None:
        across, up = "learning rate", f"validation loss at {quantity(sweep.tokens)} tokens (nats)"
        plot = dressed(figure.add_subplot(), "Loss against learning rate", across, up)
        plot.set_xscale("log")
        for number, curve in enumerate(sweep.curves):
            colour, marker = _colour(number), MARKERS[number % len(MARKERS)]
            for point in curve.points:
                plot.plot([point.rate] * len(point.losses), point.losses, ".", color=colour, markersize=5, alpha=0.5)
                if point.loss is None:
                    transform = plot.get_xaxis_transform()
                    plot.plot([point.rate], [0.97 - 0.05 * number], "x", color=colour, transform=transform)
            whole = [(point.rate, point.loss) for point in curve.points if point.loss is not None]
            label = curve.label or "mean of seeds"
            x, y = [rate for rate, _ in whole], [loss for _, loss in whole]
            plot.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.8, label=label)
            if curve.best is not None and curve.best.loss is not None:
                plot.plot([curve.best.rate], [curve.best.loss], "o", color=colour, markersize=12, fillstyle="none")
        rates = sorted({point.rate for curve in sweep.curves for point in curve.points})
        plot.set_xticks(rates, [f"{rate:g}" for rate in rates])
        plot.xaxis.set_minor_locator(NullLocator())
        words = "line: mean of seeds; dots: seeds; ring: lowest mean"
        missing = any(point.loss is None for curve in sweep.curves for point in curve.points)
        legend_below(figure, title=words + ("; cross: not all seeds got there" if missing else ""))

    return picture((WIDTH, 4.6), draw)
