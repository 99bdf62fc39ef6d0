"""Draw the training throughput of both patterns by sequence length, for the README.

python -m benchmarks.draw_training [results/gpu/training-h200-160m.json] [--output docs/images/training.svg]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common import RESULTS
from sepllm_train.base.figures import COLOURS, MARKERS, WIDTH, dressed, legend_below, picture, svg
from sepllm_train.base.files import write_whole

NAMES = {"dense": "dense attention (the fastest of torch's kernels)", "sep": "separator attention, window {window}"}


def draw(figures: dict[str, Any]) -> Figure:
    """Figure of the results of `benchmarks.training` for one model: tokens per second, with the ratios."""
    rows = sorted((row for row in figures["results"] if row.get("ratio")), key=lambda row: row["length"])
    lengths = [row["length"] for row in rows]

    def fill(figure: Figure) -> None:
        title = f"Training {rows[0]['model']} on one {figures['machine']['gpu']}, bf16"
        plot = dressed(figure.add_subplot(), title, "sequence length", "tokens per second (thousands)")
        for number, (pattern, name) in enumerate(NAMES.items()):
            speeds = [row[pattern]["tokens_per_second"] / 1000 for row in rows]
            label = name.format(window=figures["settings"]["window"])
            plot.plot(lengths, speeds, color=COLOURS[number], marker=MARKERS[number], linewidth=1.8, label=label)
        for row in rows:
            place = (row["length"], row["sep"]["tokens_per_second"] / 1000)
            plot.annotate(f"{row['ratio']:.2f}x", place, (0, 8), textcoords="offset points", ha="center", fontsize=9)
        plot.set_xscale("log", base=2)
        plot.set_xticks(lengths, [f"{length:,}" for length in lengths])
        plot.set_ylim(0, 620)
        legend_below(figure, columns=2)

    return picture((WIDTH, 3.6), fill)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the file that is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS / "training-h200-160m.json")
    parser.add_argument("--output", type=Path, default=Path("docs/images/training.svg"))
    options = parser.parse_args(arguments)
    write_whole(options.output, svg(draw(json.loads(options.results.read_text(encoding="utf8")))).encode())


if __name__ == "__main__":
    main()
