"""The style of every figure, and a figure as an SVG whose text stays text."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

# Told apart on white, on black and by colour-blind readers; the markers and dashes go on where the colours end.
COLOURS = ("#1f77c9", "#d9601a", "#12936a", "#b152b0", "#a08000", "#d6477a", "#5b6fd8", "#7a7f87")
MARKERS = "os^Dv<>P"
# Colours of text and lines, which a page replaces by those of its theme.
INK, GRID = "#1a1c1f", "#d8dade"
# Curves that are only there to compare with.
FAINT = "#9aa0a8"
DASHES = (0, (4, 3))
# Inches.
WIDTH = 7.6
# Characters of a bold title that fit the width.
_TITLE = 72
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


def picture(size: tuple[float, float], draw: Callable[[Figure], None]) -> Figure:
    """Return a figure of `size` inches that `draw` has filled."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
    return figure


def dressed(plot: Axes, title: str, across: str, up: str, *, axis: Literal["both", "x", "y"] = "both") -> Axes:
    """Return the axes with title, labels and grid."""
    plot.set_title(title, loc="left", fontsize=11, fontweight="bold")
    plot.set_xlabel(across)
    plot.set_ylabel(up)
    plot.grid(color=GRID, linewidth=0.6, axis=axis)
    plot.set_axisbelow(True)
    plot.spines[["top", "right"]].set_visible(False)
    plot.tick_params(length=0)
    return plot


def headline(figure: FigureBase, title: str) -> None:
    """Put a title over all panels, on as many lines as it takes."""
    figure.suptitle(textwrap.fill(title, _TITLE), x=0.01, ha="left", fontsize=11, fontweight="bold")


def legend_below(figure: FigureBase, *, columns: int = 3, **more: Any) -> None:
    """Put the legend under the axes, where it covers nothing."""
    figure.legend(frameon=False, fontsize=9, title_fontsize=9, loc="outside lower center", ncols=columns, **more)


def svg(figure: Figure) -> str:
    """Return the figure as a standalone SVG on white."""
    target = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(target, format="svg", metadata={"Date": None})
    return target.getvalue()


def inline(drawing: str, prefix: str) -> str:
    """Return an SVG made for the inside of a page: no prologue, own ids, no background, the page's ink and grid."""
    body = drawing[drawing.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", body)
    body = re.sub(r"fill: #ffffff", "fill: none", body)
    body = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", body, count=1)
    body = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", body, count=1)
    return body.replace(INK, "currentColor").replace(GRID, "var(--grid)")
