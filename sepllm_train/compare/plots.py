"""Figures of loss against what was spent, as PNG and as SVG whose text stays text."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sepllm_train.compare.curves import first_reach, points
from sepllm_train.compare.records import LOSS, Run
from sepllm_train.metrics.flops import CONVENTIONS

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


def axes_of(flops: str) -> list[Axis]:
    """The horizontal axes of a comparison: FLOPs counted by the convention `flops`, seconds, tokens."""
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
            tuple((size, f"training time, {unit} (validation and checkpoints left out)") for size, unit in time),
        ),
        Axis(
            "tokens",
            "loss_vs_tokens",
            "Loss against tokens",
            tuple((size, f"training tokens{unit}") for size, unit in count),
        ),
    ]


def draw(runs: Sequence[Run], axis: Axis, loss: float) -> Figure:
    """Validation loss of every run, its training loss faintly behind, and where `loss` was first reached."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.4), layout="constrained")
        plot = figure.add_subplot()
        spent = max(points(run)[-1][axis.key] for run in runs)
        size, label = axis.unit(spent)
        for number, run in enumerate(runs):
            _draw_run(plot, run, number, axis.key, size, loss)
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
        plot.legend(frameon=False, loc="upper right", title="validation (faint: training, averaged)", alignment="right")
    return figure


def _draw_run(plot: Axes, run: Run, number: int, key: str, size: float, loss: float) -> None:
    """Curves of one run; `size` is the unit of the horizontal axis."""
    colour = COLOURS[number % len(COLOURS)]
    spent, training = _training_curve(run, key)
    plot.plot([x / size for x in spent], training, color=colour, linewidth=0.8, alpha=0.35)
    validation = points(run)
    plot.plot(
        [record[key] / size for record in validation],
        [record[LOSS] for record in validation],
        color=colour,
        linewidth=1.8,
        linestyle="-" if number < len(COLOURS) else "--",
        marker=MARKERS[number % len(MARKERS)] if len(validation) <= 60 else None,
        markersize=4.5,
        label=run.label,
        zorder=3,
    )
    reached = first_reach(run, loss)
    if reached is not None:
        plot.vlines(reached.spent[key] / size, 0, loss, color=colour, linewidth=1, linestyle=DASHES)


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


def png(figure: Figure) -> bytes:
    """The figure as a PNG of 160 dots per inch on white."""
    target = io.BytesIO()
    FigureCanvasAgg(figure).print_png(target, metadata={"Software": None})
    return target.getvalue()


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
