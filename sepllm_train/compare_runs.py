"""The command: read runs, compare them, print the figures and write them to a folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sepllm_train.base.console import say
from sepllm_train.base.errors import EXIT_USER_ERROR, UserError
from sepllm_train.compare.report import REFERENCE, build_report, write_report
from sepllm_train.compare.rows import read_rows
from sepllm_train.compare.timing import read_timing
from sepllm_train.metrics.flops import CONVENTIONS


def main(argv: Sequence[str] | None = None) -> int:
    """Compare runs; gives the exit code: 0, or 2 after one sentence on a user's mistake."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.serve:
            from sepllm_train.watch import serve

            serve(arguments.runs, arguments.host, arguments.port, arguments.flops)
            return 0
        compare(
            arguments.runs,
            arguments.output,
            arguments.loss,
            arguments.flops,
            arguments.title,
            groups=arguments.groups,
            strict=arguments.strict,
            timing=arguments.timing,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare training runs: validation loss against FLOPs, seconds and tokens. "
        "Runs that differ only in their seed form a row; ratios are taken to the first row.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, such as runs/NAME")
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--output", type=Path, metavar="DIR", help="where the comparison is written")
    either.add_argument("--serve", action="store_true", help="follow the runs on a page of this machine instead")
    parser.add_argument(
        "--loss",
        type=_loss,
        help=f"validation loss to reach, or '{REFERENCE}': the first row's final one, seed by seed; default: the "
        "lowest that all reached",
    )
    parser.add_argument("--flops", choices=tuple(CONVENTIONS), default="model", help="how FLOPs are counted")
    parser.add_argument("--host", default="127.0.0.1", help="with --serve: the address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=8765, help="with --serve: the port, 0 for any (%(default)s)")
    parser.add_argument("--title", help="heading of the page; default: the names of the runs")
    parser.add_argument("--no-groups", dest="groups", action="store_false", help="every run is a row of its own")
    parser.add_argument("--strict", action="store_true", help="a run that cannot be compared is an error, not left out")
    parser.add_argument(
        "--timing",
        type=Path,
        metavar="FILE",
        help="seconds of a step by row, of a timing benchmark: they replace the seconds of the runs",
    )
    return parser


def _loss(text: str) -> float | str:
    """A loss, or REFERENCE."""
    return text if text == REFERENCE else float(text)


def compare(
    folders: Sequence[Path],
    output: Path,
    loss: float | str | None = None,
    flops: str = "model",
    title: str | None = None,
    *,
    groups: bool = True,
    strict: bool = False,
    timing: Path | None = None,
) -> None:
    """Print the comparison of run folders and write page, figures, curves, numbers and Markdown to `output`.

    `loss` (nats per token, or REFERENCE) defaults to the lowest validation loss that every run reached; `flops` is a
    key of CONVENTIONS; `groups` and `strict` are those of `read_rows`; `timing` names a timing file. Raises UserError
    when runs are missing, broken, too short or not comparable, or `output` cannot be written.
    """
    notes: list[str] = []
    rows = read_rows(folders, groups=groups, strict=strict, tell=notes.append)
    report = build_report(rows, loss, flops, title, None if timing is None else read_timing(timing), notes)
    names = write_report(report, output)
    say(report.console())
    say(f"Wrote {', '.join(names)} to {output}")
