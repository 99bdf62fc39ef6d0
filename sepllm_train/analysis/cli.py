"""The command lines of the analysis: corpus, attention, loss and ablate; what post-training recovered."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from sepllm_train.base.errors import exit_code

if TYPE_CHECKING:
    from sepllm_train.runs.open import TrainedRun

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_PROGRAM = "analyze_separators.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; gives the exit code: 0, or 2 after one sentence on a user's mistake."""
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: arguments.run(arguments))


def recovery_main(argv: Sequence[str] | None = None) -> int:
    """Report what post-trained runs recovered; gives the exit code as `main` does."""
    arguments = _recovery_parser().parse_args(argv)
    return exit_code(lambda: _run_recovery(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM, description="What separators do in a corpus, in a trained model's attention and in its loss."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_corpus(commands)
    _add_attention(commands)
    _add_loss(commands)
    _add_ablate(commands)
    return parser


def _command(commands: _Commands, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {_PROGRAM} {name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the result is written")
    return command


def _add_corpus(commands: _Commands) -> None:
    command = _command(
        commands,
        "corpus",
        "Density and gaps of every separator class in each domain: a dataset, a .txt file, or a `source` of .jsonl.",
        "data/books --output analysis/corpus",
    )
    command.add_argument("inputs", nargs="+", metavar="PREFIX_OR_FILE", help="datasets, or .txt and .jsonl files")
    command.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json or .model, needed for text files")
    command.add_argument("--unwrap", action="store_true", help="join the hard-wrapped lines of books in text files")
    command.set_defaults(run=_run_corpus)


def _run_corpus(arguments: argparse.Namespace) -> None:
    from sepllm_train.analysis.corpus import corpus_command

    corpus_command(arguments.inputs, arguments.output, tokenizer=arguments.tokenizer, unwrap=arguments.unwrap)


def _add_run(command: argparse.ArgumentParser, samples: int) -> None:
    command.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a trained run, such as runs/NAME")
    command.add_argument("--checkpoint", type=int, metavar="STEP", help="step of the checkpoint (default: the newest)")
    command.add_argument("--data", metavar="PREFIX", help="another dataset made with the run's tokenizer")
    command.add_argument(
        "--held-out", type=float, metavar="SHARE", help="share of its last tokens (default: the run's)"
    )
    command.add_argument(
        "--samples", type=int, default=samples, metavar="N", help=f"held-out samples, as far as there are ({samples})"
    )


def _run(arguments: argparse.Namespace) -> TrainedRun:
    from sepllm_train.runs.open import open_run

    return open_run(arguments.run_folder, arguments.checkpoint, data=arguments.data, held_out=arguments.held_out)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 16,32,64") from None


def _add_attention(commands: _Commands) -> None:
    command = _command(
        commands,
        "attention",
        "Attention that separators, initial tokens and neighbours receive in a trained model, by layer and head.",
        "runs/books_sep --output analysis/attention",
    )
    _add_run(command, 8)
    command.add_argument("--separators", metavar="NAMES", help="paper, all, or class names (default: the run's)")
    command.add_argument("--window", type=int, metavar="N", help="neighbours, the token included (default: the run's)")
    command.add_argument("--initial", type=int, metavar="A", help="initial tokens (default: the run's)")
    command.add_argument("--layers", type=_numbers, metavar="LIST", help="layers to look at, from 0 (default: all)")
    command.add_argument("--heads", type=_numbers, metavar="LIST", help="heads to look at, from 0 (default: all)")
    command.set_defaults(run=_run_attention)


def _run_attention(arguments: argparse.Namespace) -> None:
    from sepllm_train.analysis.attention import MassOptions, attention_command

    options = MassOptions(
        separators=arguments.separators,
        window=arguments.window,
        initial=arguments.initial,
        layers=arguments.layers,
        heads=arguments.heads,
    )
    attention_command(_run(arguments), arguments.output, options, arguments.samples)


def _add_loss(commands: _Commands) -> None:
    command = _command(
        commands,
        "loss",
        "Loss of a trained model under other attention patterns, on held-out documents.",
        "runs/books_sep --drop-classes --windows 16,32,64,128,256 --far-recall --output analysis/loss",
    )
    _add_run(command, 32)
    command.add_argument("--drop-classes", action="store_true", help="leave out each class of separators in turn")
    command.add_argument("--windows", type=_numbers, default=[], metavar="LIST", help="windows n, such as 16,32,64")
    command.add_argument("--lengths", type=_numbers, default=[], metavar="LIST", help="sequence lengths S")
    command.add_argument("--far-recall", action="store_true", help="tell far-recall tokens from others")
    command.add_argument(
        "--attention",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="pattern to vary (default: the run's; the paper's for a dense run), such as window=128 separators=all",
    )
    command.set_defaults(run=_run_loss)


def _run_loss(arguments: argparse.Namespace) -> None:
    from sepllm_train.analysis.losses import LossOptions, loss_command

    questions = LossOptions(
        drop_classes=arguments.drop_classes,
        windows=arguments.windows,
        lengths=arguments.lengths,
        far_recall=arguments.far_recall,
        attention=arguments.attention,
    )
    loss_command(_run(arguments), arguments.output, questions, arguments.samples)


def _add_ablate(commands: _Commands) -> None:
    command = _command(
        commands,
        "ablate",
        "Loss of a trained model with some of the separators, and with other tokens at as many keys kept.",
        "runs/books_dense --window 64 --output analysis/ablation",
    )
    _add_run(command, 32)
    command.add_argument("--window", type=int, metavar="N", help="neighbours, the token included (default: the run's)")
    command.add_argument("--initial", type=int, metavar="A", help="initial tokens (default: the run's)")
    command.add_argument(
        "--subsets",
        nargs="+",
        default=[],
        metavar="[NAME=]CLASSES",
        help="subsets of separators (default: nine, four, two, line breaks and each class), such as period,question",
    )
    command.set_defaults(run=_run_ablate)


def _run_ablate(arguments: argparse.Namespace) -> None:
    from sepllm_train.analysis.ablation import AblationOptions, ablation_command

    options = AblationOptions(window=arguments.window, initial=arguments.initial, subsets=arguments.subsets)
    ablation_command(_run(arguments), arguments.output, options, arguments.samples)


def _recovery_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report_recovery.py",
        description="Loss of a model before and after its post-training, beside the model that it began with.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs that began with init_from")
    parser.add_argument("--continued", type=Path, metavar="RUN", help="their source, trained on for as many tokens")
    parser.add_argument("--source", type=Path, metavar="RUN", help="where their source is now, if it was moved")
    parser.add_argument(
        "--windows", type=_numbers, default=[], metavar="LIST", help="windows n to evaluate besides, such as 16,32,64"
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="held-out samples (default: as many as validation in training takes)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the result is written (default: nowhere)")
    return parser


def _run_recovery(arguments: argparse.Namespace) -> None:
    from sepllm_train.analysis.recovery import recovery_command
    from sepllm_train.runs.open import open_run

    recovery_command(
        [open_run(folder) for folder in arguments.runs],
        arguments.output,
        source=arguments.source,
        continued=None if arguments.continued is None else open_run(arguments.continued),
        samples=arguments.samples,
        windows=arguments.windows,
    )
