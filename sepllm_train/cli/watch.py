"""sepllm watch: runs on a live page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sepllm_train.base.errors import UserError
from sepllm_train.cli import flags
from sepllm_train.metrics.flops import CONVENTIONS


def main(words: Sequence[str]) -> None:
    """Serve the page until Ctrl-C. Raises UserError."""
    parser = flags.parser("watch", "Follow runs on a page of this machine.", "runs/demo_dense runs/demo_sep")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, such as runs/NAME, or of runs")
    add("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    add("--port", type=int, default=8765, help="port, 0 for any (%(default)s)")
    add("--flops", choices=tuple(CONVENTIONS), default="model", help="how FLOPs are counted at first (%(default)s)")
    arguments = parser.parse_args(words)
    for folder in arguments.runs:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give the folder of a run, such as runs/NAME.")

    from sepllm_train.watch import serve

    serve(flags.all_runs(arguments.runs), arguments.host, arguments.port, arguments.flops)
