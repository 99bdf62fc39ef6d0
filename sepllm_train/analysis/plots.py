"""Figures of an analysis, in the one style of base/figures.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sepllm_train.base.figures import COLOURS, DASHES, INK, MARKERS, dressed, legend_below, picture

Series = Mapping[str, Sequence[float]]
# Label, x, y, style: `colour` (a number), `dashed`, `error` (standard errors of y).
Curve = tuple[str, Sequence[float], Sequence[float], dict[str, Any]]


def bars(title: str, names: Sequence[str], series: Series, across: str, errors: Series | None = None) -> Figure:
    """Horizontal bars, one group per name and one bar in it per series; `errors` are standard errors."""
    height = max(2.2, 0.17 * len(names) * (len(series) + 0.8) + 1.4)

    def draw(figure: Figure) -> None:
        plot = dressed(figure.add_subplot(), title, across, "", axis="x")
        thick = 0.8 / len(series)
        for number, (label, values) in enumerate(series.items()):
            places = np.arange(len(names)) + (number - (len(series) - 1) / 2) * thick
            plot.barh(
                places,
                values,
                height=0.9 * thick,
                color=COLOURS[number % len(COLOURS)],
                label=label,
                xerr=None if errors is None else np.nan_to_num(np.asarray(errors[label], dtype=float)),
                error_kw={"ecolor": INK, "elinewidth": 1},
            )
        plot.set_yticks(np.arange(len(names)), names)
        plot.invert_yaxis()
        plot.axvline(0, color=INK, linewidth=0.8)
        plot.margins(y=0.02)
        if len(series) > 1:
            legend_below(figure)

    return picture((7.6, height), draw)


def lines(
    title: str,
    curves: Sequence[Curve],
    across: str,
    up: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    level: float | None = None,
) -> Figure:
    """Curves, and a line across at `level`."""

    def draw(figure: Figure) -> None:
        plot = dressed(figure.add_subplot(), title, across, up)
        for number, (label, x, y, style) in enumerate(curves):
            colour = int(style.get("colour", number))
            plot.errorbar(
                x,
                y,
                yerr=style.get("error"),
                color=COLOURS[colour % len(COLOURS)],
                linestyle=DASHES if style.get("dashed") else "-",
                linewidth=1.6,
                marker=MARKERS[colour % len(MARKERS)] if len(x) <= 30 else None,
                markersize=4,
                label=label,
            )
        if log_x:
            plot.set_xscale("log", base=2)
        if log_y:
            plot.set_yscale("log")
        if level is not None:
            plot.axhline(level, color=INK, linewidth=0.8, linestyle=DASHES, zorder=1)
        if len(curves) > 1:
            legend_below(figure)

    return picture((7.6, 4.4), draw)


def stacked(title: str, names: Sequence[str], parts: Series, across: str) -> Figure:
    """One horizontal bar per name, made of parts that add up."""

    def draw(figure: Figure) -> None:
        plot = dressed(figure.add_subplot(), title, across, "", axis="x")
        begin = np.zeros(len(names))
        for number, (label, values) in enumerate(parts.items()):
            plot.barh(range(len(names)), values, left=begin, color=COLOURS[number % len(COLOURS)], label=label)
            begin += np.asarray(values, dtype=float)
        plot.set_yticks(range(len(names)), names)
        plot.invert_yaxis()
        legend_below(figure)

    return picture((7.6, max(2.6, 0.32 * len(names) + 1.6)), draw)


def heatmap(title: str, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], label: str) -> Figure:
    """A matrix as colours, with its figures where there is room."""

    def draw(figure: Figure) -> None:
        plot = figure.add_subplot()
        shown = plot.imshow(values, aspect="auto", cmap="Blues")
        plot.set_title(title, loc="left", fontsize=11, fontweight="bold")
        plot.set_yticks(range(len(rows)), rows)
        plot.set_xticks(range(len(columns)), columns)
        plot.tick_params(length=0)
        plot.spines[:].set_visible(False)
        figure.colorbar(shown, ax=plot, label=label)
        if values.size <= 160:
            middle = (np.nanmin(values) + np.nanmax(values)) / 2
            for (row, column), value in np.ndenumerate(values):
                ink = "white" if value > middle else INK
                plot.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)

    return picture((max(6.0, 0.55 * len(columns) + 2.2), max(2.4, 0.34 * len(rows) + 1.2)), draw)
