"""The command: read runs, compare them, print the figures and write them to a folder."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import UserError
from data_prep.files import write_whole
from sepllm_train.compare import plots, tables
from sepllm_train.compare.comparable import caveats, check_comparable
from sepllm_train.compare.curves import best_loss, check_curves, common_loss
from sepllm_train.compare.page import METHOD, page
from sepllm_train.compare.records import Run, read_runs
from sepllm_train.console import say
from sepllm_train.errors import EXIT_USER_ERROR
from sepllm_train.metrics.flops import CONVENTIONS


def main(argv: Sequence[str] | None = None) -> int:
    """Compare runs; gives the exit code: 0, or 2 after one sentence on a user's mistake."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.serve:
            from sepllm_train.serve import serve

            serve(arguments.runs, arguments.host, arguments.port, arguments.flops)
            return 0
        compare(arguments.runs, arguments.output, arguments.loss, arguments.flops, arguments.title)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare training runs: validation loss against FLOPs, seconds and tokens. "
        "Ratios are taken to the first run.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, such as runs/NAME")
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--output", type=Path, metavar="DIR", help="where the comparison is written")
    either.add_argument("--serve", action="store_true", help="follow the runs on a page of this machine instead")
    parser.add_argument("--loss", type=float, help="validation loss to reach; default: the lowest that all reached")
    parser.add_argument("--flops", choices=tuple(CONVENTIONS), default="model", help="how FLOPs are counted")
    parser.add_argument("--host", default="127.0.0.1", help="with --serve: the address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=8765, help="with --serve: the port, 0 for any (%(default)s)")
    parser.add_argument("--title", help="heading of the page; default: the names of the runs")
    return parser


def compare(
    folders: Sequence[Path],
    output: Path,
    loss: float | None = None,
    flops: str = "model",
    title: str | None = None,
) -> None:
    """Print the comparison of run folders and write page, figures, curves and Markdown to the folder `output`.

    `loss` (nats per token) defaults to the lowest validation loss that every run reached; `flops` is a key of
    CONVENTIONS. Raises UserError when runs are missing, broken, too short or not comparable, or `output` cannot be
    written.
    """
    if len(folders) < 2:
        raise UserError("A comparison needs at least two run folders, and one was given.")
    runs = read_runs(folders)
    check_comparable(runs)
    check_curves(runs)
    loss = common_loss(runs) if loss is None else _reachable(loss, runs)
    title = title or f"Comparison of {', '.join(run.label for run in runs)}"
    summary = tables.verdict(runs, loss, flops)
    warnings = caveats(runs)
    main_tables = [tables.to_reach(runs, loss, flops), tables.at_equal_tokens(runs, flops)]
    more_tables = [tables.along_tokens(runs), tables.by_dataset(runs), tables.what_differs(runs)]
    all_tables = main_tables + [table for table in more_tables if table is not None and table.rows]
    convention = f"flops/{flops}: {CONVENTIONS[flops].words}"
    markdown = "\n".join(
        [f"# {title}\n", f"{summary}\n", *(f"- {warning}\n" for warning in warnings)]
        + [table.markdown() for table in all_tables]
        + [f"{convention}\n", METHOD]
    )
    figures = [(axis, plots.draw(runs, axis, loss)) for axis in plots.axes_of(flops)]
    drawings = [(axis, plots.svg(figure)) for axis, figure in figures]
    inlined = [(axis.title, plots.inline(drawing, axis.file)) for axis, drawing in drawings]
    files = {f"{axis.file}.png": plots.png(figure) for axis, figure in figures}
    files |= {f"{axis.file}.svg": drawing.encode() for axis, drawing in drawings}
    files["curves.csv"] = tables.curves_csv(runs).encode()
    files["comparison.md"] = f"{markdown}\n".encode()
    files["comparison.html"] = page(title, summary, warnings, all_tables, inlined).encode()
    _write(output, files)
    say("\n".join([*(table.markdown() for table in main_tables), convention, "", *warnings, summary, ""]))
    say(f"Wrote {', '.join(files)} to {output}")


def _reachable(loss: float, runs: Sequence[Run]) -> float:
    """`loss`, if it is a loss that some run reached; raises UserError otherwise."""
    lowest = min(runs, key=best_loss)
    if not math.isfinite(loss) or loss < best_loss(lowest):
        raise UserError(f"No run reached --loss {loss:g}: the lowest is {best_loss(lowest):.4f}, of {lowest.label}.")
    return loss


def _write(output: Path, files: dict[str, bytes]) -> None:
    """Write every file whole; raises UserError when the folder or a file cannot be made."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: name a folder.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(output / name, content)
    except OSError as error:
        raise UserError(f"Cannot write to --output {output}: {error.strerror}.") from None
