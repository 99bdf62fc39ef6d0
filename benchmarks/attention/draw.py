"""Draws the newest GPU results: a picture, and the tables of docs/performance.md.

    python -m benchmarks.attention.draw

The tables replace what stands between `<!-- kernel results -->` and `<!-- end kernel results -->`. All result files of
the newest one's machine and kernels are drawn together; a ratio is always of two times of one run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import ROOT
from benchmarks.common import RESULTS, exit_with, read_json, write_text
from sepllm_train.base.errors import UserError
from sepllm_train.base.figures import COLOURS, DASHES, INK, MARKERS, WIDTH, dressed, legend_below, picture, svg

BEGIN, END = "<!-- kernel results -->", "<!-- end kernel results -->"
NOT_MEASURED = "The kernels have not been measured on a GPU yet: `make bench-kernels` does it where there is one.\n"
DENSE_BARS = {2048: 1.5, 4096: 2.2, 8192: 3.0, 16384: 3.6, 32768: 4.0}
FLEX_BARS = {2048: 2.5, 8192: 4.0}
OURS = "ours"
# Operations a pair, in multiples of D: forward, and forward and backward of a fused kernel; ours by kernel.
NEEDED_OPERATIONS = {"forward": 4, "both": 14}
TOUCHED_OPERATIONS = {"forward": 4, "backward_q": 6, "backward_kv": 8}
PICTURE = "kernels.svg"

Row = dict[str, Any]


def load_results(folder: Path) -> list[dict[str, Any]]:
    """Result files of the newest one's GPU and kernels, the newest last; trials on a CPU are left out.

    Raises UserError for a file that is not JSON.
    """
    files = [content for content in map(read_json, folder.glob("attention-*.json")) if "driver" in content["machine"]]
    files.sort(key=lambda content: content["time"])
    return [content for content in files if content["machine"] == files[-1]["machine"] and content["rows"]]


def merged_rows(files: Iterable[dict[str, Any]]) -> list[Row]:
    """Rows of all files with `ratios`: (kernel, pass) -> its time over ours in the same run. A cell's rows are one."""
    cells: dict[tuple[Any, ...], Row] = {}
    for row in (row for content in files for row in content["rows"]):
        ours = row["kernels"].get(OURS, {})
        if "both" not in ours:
            continue
        key = (row["head_size"], row["groups"], row["window"], row["source"], row["length"])
        merged = cells.setdefault(key, row | {"ratios": {}, "reasons": {}})
        for name, result in row["kernels"].items():
            if "both" not in result:
                merged["reasons"][name] = result["reason"]
            elif name != OURS:
                for step in ("forward", "backward", "both"):
                    ratio = result[step]["median"] / ours[step]["median"]
                    merged["ratios"][name, step] = (ratio, result["sparse"])
    return [cells[key] for key in sorted(cells)]


def best_dense(row: Row, step: str = "both") -> tuple[float, str] | None:
    """Time of the fastest dense kernel over that of ours, and its name."""
    found = [(ratio, name) for (name, part), (ratio, sparse) in row["ratios"].items() if part == step and not sparse]
    return min(found, default=None)


def teraflops(row: Row, step: str = "both") -> tuple[float, float]:
    """TFLOP/s of ours: on the pairs that are needed (a backward counting 10 D a pair), and on those it touches."""
    scale = row["head_size"] * row["heads"] * row["batch"] / row["kernels"][OURS][step]["median"] / 1e9
    kernels = TOUCHED_OPERATIONS if step == "both" else {step: TOUCHED_OPERATIONS[step]}
    touched = sum(operations * row["touched_pairs"][kernel] for kernel, operations in kernels.items())
    return NEEDED_OPERATIONS[step] * row["needed_pairs"] * scale, touched * scale


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _against(ratio: float | None, bar: float | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.2f}x" + ("" if bar is None else f" (bar {bar:g}x {'met' if ratio >= bar else 'missed'})")


def _main_line(row: Row) -> tuple[str, ...]:
    dense, length = best_dense(row), row["length"]
    flex, gathered = (row["ratios"].get((name, "both"), (None,))[0] for name in ("flex", "flex gathered"))
    needed, touched = teraflops(row)
    return (
        str(length),
        str(row["head_size"]),
        f"{row['source']} ({row['density']:.1%})",
        f"{row['kernels'][OURS]['both']['median']:.3f}",
        "-" if dense is None else dense[1],
        _against(None if dense is None else dense[0], DENSE_BARS.get(length)),
        _against(flex, FLEX_BARS.get(length)),
        _against(gathered, None),
        f"{needed:.0f} / {touched:.0f}",
    )


def _other_line(row: Row) -> tuple[str, ...]:
    ratios = [best_dense(row, step) for step in ("forward", "backward", "both")]
    cell = (str(row[key]) for key in ("length", "head_size", "window", "groups", "source"))
    return (*cell, *("-" if best is None else f"{best[0]:.2f}x" for best in ratios))


def section(files: Sequence[dict[str, Any]]) -> str:
    """The Markdown of the results; one sentence when there are none."""
    rows = merged_rows(files)
    if not rows:
        return NOT_MEASURED
    machine, limits = files[-1]["machine"], files[-1]["limits"][-1]
    head = (
        "S",
        "D",
        "separators",
        "ours, ms",
        "best dense",
        "over dense",
        "over Flex",
        "over gathered Flex",
        "TFLOP/s",
    )
    heart = [row for row in rows if is_heart(row)]
    others = [row for row in rows if not is_heart(row)]
    reasons = {f"{name}: {reason}" for row in rows for name, reason in row["reasons"].items()}
    versions = ", ".join(f"{name} {machine[name]}" for name in ("driver", "cuda", "cudnn", "torch", "triton"))
    parts = [
        f"{machine['device']}, {versions}; kernels {machine['kernels']}, {files[-1]['time'][:10]}. In the same run a "
        f"bf16 matrix product reached {limits['bf16_matmul_tflops']:.0f} TFLOP/s and a copy "
        f"{limits['copy_gbytes_per_second']:.0f} GB/s. Medians of forward and backward together; TFLOP/s of ours on "
        "the pairs needed / touched.\n",
        f"![Speed-up of the kernels over the fastest dense kernel](images/{PICTURE})\n",
        _table(head, map(_main_line, heart)),
    ]
    if others:
        columns = ("S", "D", "n", "heads per KV head", "separators", "forward", "backward", "both")
        parts += ["Other cells, times as fast as the best dense kernel:\n", _table(columns, map(_other_line, others))]
    if reasons:
        parts += ["Not timed:\n", "".join(f"- {reason}\n" for reason in sorted(reasons))]
    return "\n".join(parts)


def is_heart(row: Row) -> bool:
    """True for a row that bars are set for: n = 128, one query head per key-value head, text or 12%."""
    return (row["window"], row["groups"]) == (128, 1) and row["source"] in ("text", "12%")


def speed_up(rows: Sequence[Row]) -> Figure:
    """Draw the speed-up over the best dense kernel against the length, a curve per head size and source."""
    curves: dict[tuple[int, str], list[tuple[int, float]]] = {}
    for row in rows:
        best = best_dense(row)
        if is_heart(row) and best is not None:
            curves.setdefault((row["head_size"], row["source"]), []).append((row["length"], best[0]))

    def draw(figure: Figure) -> None:
        title, up = "Forward and backward, n = 128", "times as fast as the best dense kernel"
        plot = dressed(figure.add_subplot(), title, "sequence length", up)
        for number, ((head_size, source), points) in enumerate(sorted(curves.items())):
            x, y = [length for length, _ in points], [ratio for _, ratio in points]
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            label = f"D = {head_size}, separators: {source}"
            plot.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.8, label=label)
        goal = list(DENSE_BARS.values())
        plot.plot(list(DENSE_BARS), goal, color=INK, linestyle=DASHES, linewidth=1, label="goal of the project")
        plot.axhline(1, color=INK, linewidth=0.8)
        plot.set_xscale("log", base=2)
        plot.set_xticks(list(DENSE_BARS), [f"{length:,}" for length in DENSE_BARS])
        plot.set_ylim(bottom=0)
        legend_below(figure, columns=2)

    return picture((WIDTH, 4.9), draw)


def document(content: str, section: str, path: Path) -> str:
    """`content` with the part between the marks replaced. Raises UserError when the marks are not there once each."""
    if content.count(BEGIN) != 1 or content.count(END) != 1 or content.index(BEGIN) > content.index(END):
        raise UserError(f"{path} must hold the lines {BEGIN} and {END}, once each and in this order.")
    return f"{content[: content.index(BEGIN)]}{BEGIN}\n{section}{content[content.index(END) :]}"


def main() -> int:
    """Draw picture and tables of the newest results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="result files (%(default)s)")
    default = ROOT / "docs" / "performance.md"
    parser.add_argument("--document", type=Path, default=default, metavar="FILE", help="what to write in (%(default)s)")
    options = parser.parse_args()
    if not options.document.is_file():
        raise UserError(f"{options.document} does not exist: it takes the tables between {BEGIN} and {END}.")
    files = load_results(options.results)
    text = document(options.document.read_text(encoding="utf8"), section(files), options.document)
    rows = merged_rows(files)
    if rows:
        write_text(options.document.parent / "images" / PICTURE, svg(speed_up(rows)))
    write_text(options.document, text)
    print(f"{len(rows)} cells of {len(files)} result files drawn into {options.document}")
    return 0


if __name__ == "__main__":
    exit_with(main)
