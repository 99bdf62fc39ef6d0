"""sepllm average: the mean of several checkpoints of a run, as a run of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sepllm_train.base.errors import UserError
from sepllm_train.cli import flags


def main(words: Sequence[str]) -> None:
    """Average checkpoints. Raises UserError."""
    parser = flags.parser(
        "average",
        "Make a run whose weights are the mean of those of several checkpoints of a run. OUTPUT is evaluated,\n"
        "analyzed, exported and continued with init_from=OUTPUT like any run; it has weights alone, no optimizer.",
        "runs/books_sep runs/books_mean --last 4\nruns/books_sep runs/books_mean --steps 600,800,1000",
    )
    flags.add_run_folder(parser)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write, such as runs/NEW")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--last", type=int, metavar="N", help="the N newest checkpoints")
    which.add_argument("--steps", type=flags.numbers, metavar="S,S,...", help="the checkpoints of these steps")
    arguments = parser.parse_args(words)
    flags.at_least(arguments, 1, "last")
    flags.require_run(arguments.run_folder)
    steps = _steps(arguments.run_folder, arguments.last, arguments.steps)
    flags.require_new(arguments.output)

    from sepllm_train.runs.average import average_checkpoints

    average_checkpoints(arguments.run_folder, steps, arguments.output)


def _steps(folder: Path, last: int | None, asked: Sequence[int] | None) -> list[int]:
    """Steps of the checkpoints that are meant. Raises UserError for those that are not there, or named twice."""
    if asked is None:
        assert last is not None
        known = flags.checkpoint_steps(folder)
        if last > len(known):
            steps = ", ".join(map(str, known)) or "none"
            raise UserError(f"--last {last} is more checkpoints than {folder} has: there are {steps}.")
        return known[-last:]
    for step, times in Counter(asked).items():
        flags.require_run(folder, step)
        if times > 1:
            raise UserError(f"--steps names {step} twice: each checkpoint counts once.")
    return sorted(asked)
