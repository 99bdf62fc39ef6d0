"""sepllm compare: validation loss of runs against FLOPs, seconds and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sepllm_train.base.console import say
from sepllm_train.cli import flags
from sepllm_train.metrics.flops import CONVENTIONS

# As in compare.report, which draws figures and is imported late.
REFERENCE = "reference"


def main(words: Sequence[str]) -> None:
    """Compare runs. Raises UserError."""
    parser = flags.parser(
        "compare",
        "Compare training runs: validation loss against FLOPs, seconds and tokens. Runs that differ only in their seed "
        "form a variant; ratios are taken to the first variant.",
        "runs/demo_dense runs/demo_sep --output runs/comparison",
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, such as runs/NAME, or of runs")
    add("--output", type=Path, required=True, metavar="DIR", help="where the comparison is written")
    add(
        "--loss",
        type=_loss,
        help=f"validation loss to reach, or '{REFERENCE}': the first variant's final one, seed by seed; default: the "
        "lowest that all reached",
    )
    add("--flops", choices=tuple(CONVENTIONS), default="model", help="how FLOPs are counted (%(default)s)")
    add("--title", help="heading of the page; default: the names of the runs")
    add("--no-groups", dest="groups", action="store_false", help="every run is a variant of its own")
    add("--strict", action="store_true", help="a run that cannot be compared is an error, not left out")
    add(
        "--timing",
        type=Path,
        metavar="FILE",
        help="seconds of a step by variant, of a timing benchmark: they replace the seconds of the runs",
    )
    options = vars(parser.parse_args(words))
    compare(flags.all_runs(options.pop("runs")), options.pop("output"), **options)


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
    key of CONVENTIONS; `groups` and `strict` are those of `read_variants`; `timing` names a timing file.

    Raises UserError when runs are missing, broken, too short or not comparable, or `output` cannot be written.
    """
    from sepllm_train.compare.timing import read_timing
    from sepllm_train.compare.variants import read_variants

    notes: list[str] = []
    variants = read_variants(folders, groups=groups, strict=strict, warn=notes.append)
    seconds = None if timing is None else read_timing(timing)

    # matplotlib takes longer than to find a run that is missing.
    from sepllm_train.compare.report import build_report, write_report

    report = build_report(variants, loss, flops, title, seconds, notes)
    names = write_report(report, output)
    say(report.console())
    say(f"Wrote {', '.join(names)} to {output}")
